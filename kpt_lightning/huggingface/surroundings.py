"""What Accelerate has decided for this process, and what of it this library cannot go with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError

if TYPE_CHECKING:
    from accelerate.state import AcceleratorState

# Accelerate's mixed precision -> the same in our words.
_PRECISIONS = {"no": "32", "bf16": "bf16-mixed", "fp16": "16-mixed"}
# What each of them leaves to the config. Under autocast the weights may be bf16 too.
_FITTING = {
    "32": ("auto", "32", "bf16-mixed", "fp8", "bf16", "fp8-true"),
    "bf16-mixed": ("auto", "bf16-mixed", "fp8", "bf16", "fp8-true"),
    "16-mixed": ("auto",),
}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What Accelerate has decided.

    Attributes:
        parallel: single, ddp or fsdp2.
        precision: Accelerate's own mixed precision: 32, bf16-mixed or 16-mixed.
        compiles: Accelerate compiles each model after it was prepared.
        device: Of this process.
        processes: That train together.
    """

    parallel: str
    precision: str
    compiles: bool
    device: torch.device
    processes: int


def surroundings(state: "AcceleratorState", config: KptConfig) -> Surroundings:
    """Read Accelerate's state, and refuse what contradicts the config.

    Raises:
        ConfigError: Accelerate's own FP8, a way of parallel training that is not supported, or a setting of the
            config that Accelerate's makes impossible.
    """
    if state.mixed_precision not in _PRECISIONS:
        raise ConfigError(
            "mixed_precision", state.mixed_precision, "is Accelerate's own FP8, and two conversions of one layer "
            "exclude each other", "Set mixed_precision to 'bf16'; kpt converts the layers",
        )  # fmt: skip
    found = Surroundings(
        parallel=_parallel(state), precision=_PRECISIONS[state.mixed_precision], compiles=_compiles(state),
        device=state.device, processes=state.num_processes,
    )  # fmt: skip
    if config.parallel not in ("auto", found.parallel):
        raise ConfigError(
            "parallel", config.parallel, f"contradicts Accelerate, which runs {found.parallel!r}",
            "Remove it: under Accelerate its own config decides",
        )  # fmt: skip
    if config.precision not in _FITTING[found.precision]:
        raise ConfigError(
            "precision", config.precision, f"contradicts mixed_precision={state.mixed_precision!r} of Accelerate",
            f"Set mixed_precision to 'bf16' or 'no', or precision to one of {', '.join(_FITTING[found.precision])}",
        )  # fmt: skip
    if found.compiles:
        _check_compiled(found, config)
    return found


def _parallel(state: "AcceleratorState") -> str:
    from accelerate.utils import DistributedType

    kind = state.distributed_type
    if kind == DistributedType.NO:
        return "single"
    if kind in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        return "ddp"
    if kind == DistributedType.FSDP:
        version = getattr(state.fsdp_plugin, "fsdp_version", 1)
        if version == 2:
            return "fsdp2"
        raise ConfigError(
            "fsdp_version", version, "flattens the parameters of layers that kpt converts", "Set fsdp_version to 2"
        )
    raise ConfigError(
        "distributed_type", str(kind.value), "is not supported beside kpt",
        "Use NO, MULTI_GPU, MULTI_CPU, or FSDP with fsdp_version 2",
    )  # fmt: skip


def _compiles(state: "AcceleratorState") -> bool:
    from accelerate.utils import DynamoBackend

    return bool(state.dynamo_plugin.backend != DynamoBackend.NO)


def _check_compiled(found: Surroundings, config: KptConfig) -> None:
    """Accelerate compiles the whole model: what else compiles, or would have to stand around it, cannot be met."""
    for name in ("blocks", "loss"):
        if getattr(config.compile, name) is True:
            raise ConfigError(
                f"compile.{name}", True, "was asked for, and Accelerate compiles the whole model already",
                "Remove it, or turn off dynamo_config (torch_compile of the Trainer)",
            )  # fmt: skip
    if found.precision == "32" and config.precision not in ("auto", "32"):
        raise ConfigError(
            "precision", config.precision, "needs autocast around a model that Accelerate compiles",
            "Set mixed_precision to 'bf16' in Accelerate's config (bf16 of the Trainer)",
        )  # fmt: skip
