"""The same leaves for lightning.fabric.Fabric, whose strategies share no base with the Trainer's."""

from typing import Any

import torch
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from kpt_lightning.strategies.conflicts import check_single
from kpt_lightning.strategies.connector import Request
from kpt_lightning.strategies.fsdp2 import OneMesh, shard
from kpt_lightning.strategies.leaf import ConfigSource, KptLeaf

__all__ = ["KptFabricDDP", "KptFabricFSDP2", "KptFabricSingleDevice"]


class FabricLeaf(KptLeaf):
    """What Fabric's leaves share."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Fabric's setup; the precision plugin has converted and compiled before."""
        self._start_engine(module)
        wrapped: nn.Module = super().setup_module(module)  # type: ignore[misc]
        self._report()
        return wrapped


class KptFabricSingleDevice(FabricLeaf, SingleDeviceStrategy):
    """One device."""

    _parallel = "single"

    def bind(self, request: Request) -> None:
        """As KptLeaf.bind. Raises ConfigError where ``devices`` would be ignored."""
        check_single(request, type(self).__name__)
        self._root_device = torch.device(request.parallel_devices[0])
        super().bind(request)


class KptFabricDDP(FabricLeaf, DDPStrategy):  # type: ignore[misc]
    """Several processes, each with the whole model."""

    _parallel = "ddp"


class KptFabricFSDP2(FabricLeaf, OneMesh, ModelParallelStrategy):
    """Several processes, each with a shard."""

    _parallel = "fsdp2"

    def __init__(
        self, config: ConfigSource = None, *, level: str | None = None, precision: str | None = None, **lightning: Any
    ) -> None:
        """Arguments as KptLeaf."""
        super().__init__(config, level=level, precision=precision, parallelize_fn=self._parallelize, **lightning)

    def _parallelize(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        shard(module, mesh["data_parallel"], self.root_device, self.plan)
        return module
