"""A config file for ``accelerate launch`` that goes with kpt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import ACCELERATE

ParallelKind = Literal["single", "ddp", "fsdp2"]
MixedPrecision = Literal["bf16", "no"]

USE_CPU_VARIABLE = "ACCELERATE_USE_CPU"
"""Accelerate 1.15 hands ``use_cpu`` only to a process that it starts without torchrun; torchrun's read this instead."""

FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_offload_params": False,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    # True leaves the weights of all ranks but one on the meta device, where nothing can be converted.
    "fsdp_cpu_ram_efficient_loading": False,
    "fsdp_activation_checkpointing": False,
}
"""Accelerate's own defaults of FSDP2, without loading on one rank."""

_TYPES = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AccelerateSetup:
    """What a config file for Accelerate says, in our words.

    Attributes:
        parallel: single, ddp or fsdp2.
        processes: Processes in all, on one machine.
        mixed_precision: Of Accelerate; FP8 is kpt's, in kpt's own file.
        cpu: Train on CPU.
    """

    parallel: ParallelKind = "single"
    processes: int = 1
    mixed_precision: MixedPrecision = "bf16"
    cpu: bool = False

    def __post_init__(self) -> None:
        """Refuse what Accelerate would not run as it says.

        Raises:
            ConfigError: Processes and the way of distributing contradict each other, or CPUs cannot do it.
        """
        if self.processes < 1:
            raise ConfigError("processes", self.processes, "must be at least 1", "Give the number of devices")
        if self.parallel == "single" and self.processes > 1:
            raise ConfigError("parallel", "single", f"is one process, and processes is {self.processes}", "Set 'ddp'")
        if self.parallel == "ddp" and self.processes < 2:
            raise ConfigError("processes", self.processes, "must be at least 2 for 'ddp'", "Set parallel to 'single'")
        if self.parallel == "fsdp2" and self.cpu:
            rule = "does not run on CPU under Accelerate, which would run DDP instead"
            raise ConfigError("parallel", "fsdp2", rule, "Set 'ddp', or write the file for GPUs")

    def to_dict(self) -> dict[str, Any]:
        """Keys and values as Accelerate's file has them."""
        # MULTI_CPU would need mpirun: Accelerate starts processes of its own only for devices.
        settings: dict[str, Any] = {
            "compute_environment": "LOCAL_MACHINE",
            "debug": False,
            "distributed_type": _TYPES[self.parallel],
            "enable_cpu_affinity": False,
            "machine_rank": 0,
            "main_training_function": "main",
            "mixed_precision": self.mixed_precision,
            "num_machines": 1,
            "num_processes": self.processes,
            "rdzv_backend": "static",
            "same_network": True,
            "use_cpu": self.cpu,
        }
        if self.parallel == "fsdp2":
            settings["fsdp_config"] = dict(FSDP2)
        return settings

    def write(self, path: str | Path) -> None:
        """Write the file.

        Raises:
            ConfigError: It cannot be written.
        """
        text = "# For accelerate launch. FP8 and the other optimizations are set in kpt's own file.\n"
        write_text(path, text + yaml.safe_dump(self.to_dict(), sort_keys=False))

    def command(self, accelerate_yaml: str | Path, kpt_yaml: str | Path, script: str = "train.py") -> str:
        """The shell line that trains with both files."""
        environment = f"{USE_CPU_VARIABLE}=true " if self.cpu and self.processes > 1 else ""
        module = f"-m kpt_lightning.launch --kpt-config {_quoted(kpt_yaml)} {script}"
        return f"{environment}accelerate launch --config_file {_quoted(accelerate_yaml)} {module}"


def setup_for_this_machine() -> AccelerateSetup:
    """One process for each GPU that torch sees, bf16 where it has units for it; else one process on the CPU."""
    ACCELERATE.require("a config file for accelerate launch")
    import torch

    count = torch.cuda.device_count()
    if not count:
        return AccelerateSetup(mixed_precision="no", cpu=True)
    precision: MixedPrecision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return AccelerateSetup(parallel="ddp" if count > 1 else "single", processes=count, mixed_precision=precision)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of settings.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise ConfigError("output", str(path), rule, "Give the path of a file in a directory that exists") from error


def _quoted(path: str | Path) -> str:
    import shlex

    return shlex.quote(str(path))
