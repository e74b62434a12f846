"""The Trainer's strategies: Lightning's single device and DDP, driven by the engine."""

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from kpt_lightning.errors import ConfigError
from kpt_lightning.strategies.conflicts import check_single
from kpt_lightning.strategies.connector import Request
from kpt_lightning.strategies.leaf import ConfigSource, KptLeaf

__all__ = ["KptDDP", "KptSingleDevice", "TrainerLeaf"]


class TrainerLeaf(KptLeaf):
    """What the Trainer's leaves share."""

    def setup(self, trainer: Any) -> None:
        """Lightning's setup; the precision plugin converts and compiles before anything is wrapped.

        Raises:
            ConfigError: A parameter has no data yet.
        """
        self._refuse_meta()
        self._start_engine(self.model)  # type: ignore[attr-defined]
        super().setup(trainer)  # type: ignore[misc]
        if trainer.state.fn == TrainerFn.FITTING:
            self.engine.look(self.broadcast)  # type: ignore[attr-defined]
        self.engine.take_optimizers(self.optimizers)  # type: ignore[attr-defined]
        self._report()

    def _refuse_meta(self) -> None:
        module: nn.Module = self.model  # type: ignore[attr-defined]
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                # Lightning's teardown would move the module to the CPU, which fails and hides this error.
                vars(self)["_lightning_module"] = None
                raise ConfigError(
                    "model", name, "is on the meta device, and one device or DDP needs its data",
                    "Make the weights in configure_model, load them, or use KptStrategy(parallel='fsdp2')",
                )  # fmt: skip


class KptSingleDevice(TrainerLeaf, SingleDeviceStrategy):
    """One device."""

    strategy_name = "kpt_single_device"
    _parallel = "single"

    def __init__(
        self,
        device: str | torch.device | None = None,
        config: ConfigSource = None,
        *,
        level: str | None = None,
        precision: str | None = None,
        **lightning: Any,
    ) -> None:
        """Nothing is touched yet.

        Args:
            device: None takes the one that the Trainer chooses.
            config: Settings, or the path of a YAML file.
            level: conservative, balanced or aggressive.
            precision: auto, fp8, fp8-true, bf16, bf16-mixed or 32.
            lightning: Arguments of Lightning's SingleDeviceStrategy.
        """
        super().__init__(config, level=level, precision=precision, device=device or "cpu", **lightning)
        self._device_given = device is not None

    def bind(self, request: Request) -> None:
        """As KptLeaf.bind. Raises ConfigError where ``devices`` or ``accelerator`` would be ignored."""
        check_single(request, type(self).__name__)
        chosen = torch.device(request.parallel_devices[0])
        if not self._device_given:
            self._root_device = chosen
        elif self._root_device.type != chosen.type:
            raise ConfigError(
                f"{type(self).__name__}(device)", str(self._root_device), f"contradicts the {request.owner}'s "
                f"accelerator, which gives {chosen}", "Remove device, or set accelerator to match",
            )  # fmt: skip
        super().bind(request)


class KptDDP(TrainerLeaf, DDPStrategy):
    """Several processes, each with the whole model."""

    strategy_name = "kpt_ddp"
    _parallel = "ddp"
