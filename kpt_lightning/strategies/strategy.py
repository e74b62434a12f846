"""KptStrategy: what the user writes. When Lightning has chosen the devices it puts a concrete leaf in its own place.

It replaces itself in the connector instead of changing its own class, so the user's object stays as it was written and
serves a second Trainer, Fabric, a deepcopy or a pickle.
"""

import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from lightning.fabric.strategies.strategy import Strategy as FabricStrategy
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.strategy import TBroadcast
from torch import Tensor

from kpt_lightning.config import KptConfig, ParallelName, PrecisionName
from kpt_lightning.errors import ConfigError, KptError, UnsupportedHardwareError
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.replay import load_plan
from kpt_lightning.strategies.connector import Request, calling_request
from kpt_lightning.strategies.fabric import KptFabricDDP, KptFabricFSDP2, KptFabricSingleDevice
from kpt_lightning.strategies.fsdp2 import KptFSDP2
from kpt_lightning.strategies.leaf import ConfigSource
from kpt_lightning.strategies.leaves import KptDDP, KptSingleDevice
from kpt_lightning.versions import check_versions

_TRAINER_LEAVES: dict[str, Any] = {"single": KptSingleDevice, "ddp": KptDDP, "fsdp2": KptFSDP2}
_FABRIC_LEAVES: dict[str, Any] = {"single": KptFabricSingleDevice, "ddp": KptFabricDDP, "fsdp2": KptFabricFSDP2}
# Set by the connector before it calls _configure_launcher; handed on to the leaf where it has them.
_FROM_CONNECTOR = ("accelerator", "cluster_environment", "parallel_devices", "_layer_sync")


class KptStrategy(Strategy):
    """``Trainer(strategy=KptStrategy())`` or ``Fabric(strategy=KptStrategy())``."""

    strategy_name = "kpt"

    def __init__(
        self,
        config: ConfigSource = None,
        *,
        level: Literal["conservative", "balanced", "aggressive"] | None = None,
        precision: PrecisionName = "auto",
        parallel: ParallelName = "auto",
        plan: Plan | dict[str, Any] | str | Path | None = None,
        **lightning: Any,
    ) -> None:
        """Check the settings; no device is touched.

        Args:
            config: Settings, or the path of a YAML file.
            level: What may change in the numbers.
            precision: auto follows the hardware; what is given wins.
            parallel: auto is single for one device and ddp for several.
            plan: Made by trial before, its dict, or its JSON file; its settings hold, so no other may be given.
            lightning: Arguments of the Lightning strategy that it becomes, such as ``find_unused_parameters``.

        Raises:
            ConfigError: A setting is unknown, of the wrong type, or contradicts another one.
            MissingDependencyError: Lightning or torch is of a version that was not tried.
        """
        check_versions()
        self.config = KptConfig.build(
            config,
            level=level,
            precision=None if precision == "auto" else precision,
            parallel=None if parallel == "auto" else parallel,
        )
        self.plan_given = None if plan is None else _taken(plan, self.config)
        if self.plan_given is not None:
            self.config = self.plan_given.config.model_copy(update={"parallel": self.config.parallel})
        self._lightning = lightning
        self._forget()
        _announce()

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.config.model_dump(exclude_unset=True).items())
        return f"KptStrategy({settings})"

    def _forget(self) -> None:
        """What a connector sets, as Lightning's own constructors leave it."""
        super().__init__()
        self._precision: Any = None  # Fabric's name for the plugin
        self._backward_sync_control = None
        self.parallel_devices: list[torch.device] | None = None
        self.cluster_environment: Any = None
        self.num_nodes = 1
        self._num_nodes = 1
        self._layer_sync: Any = None

    def _configure_launcher(self) -> None:
        request = calling_request()
        leaf = self._leaf(request)
        for name in _FROM_CONNECTOR:
            if hasattr(leaf, name):
                setattr(leaf, name, getattr(self, name))
        if hasattr(leaf, "num_nodes"):
            leaf.num_nodes = request.num_nodes
        if self._checkpoint_io is not None:
            leaf.checkpoint_io = self._checkpoint_io
        self._forget()
        leaf._why_parallel = "by device count"
        for set_ranks in ("set_world_ranks", "_set_world_ranks"):
            if hasattr(leaf, set_ranks):
                getattr(leaf, set_ranks)()
        leaf._configure_launcher()
        request.connector.strategy = leaf

    def _leaf(self, request: Request) -> Any:
        """The concrete strategy for these devices."""
        several = len(request.parallel_devices) * request.num_nodes > 1
        parallel = self.config.parallel
        if parallel == "auto":
            parallel = "ddp" if several else "single"
        leaves = _FABRIC_LEAVES if request.is_fabric else _TRAINER_LEAVES
        if parallel not in leaves:
            raise UnsupportedHardwareError(
                f"parallel={parallel!r} was asked for, and this version has no XLA strategy. "
                f"Choose one of {', '.join(leaves)}"
            )
        leaf = leaves[parallel](config=self.config, **self._lightning)
        leaf.engine.plan_given = self.plan_given
        return leaf

    def _unbound(self) -> NoReturn:
        raise KptError(
            "KptStrategy has no device yet. Pass it to Trainer(strategy=...) or Fabric(strategy=...) and use "
            "trainer.strategy"
        )

    @property
    def root_device(self) -> torch.device:
        """Known once bound."""
        self._unbound()

    @property
    def is_global_zero(self) -> bool:
        """Known once bound."""
        self._unbound()

    def model_to_device(self) -> None:
        """Possible once bound."""
        self._unbound()

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Possible once bound."""
        self._unbound()

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Possible once bound."""
        self._unbound()

    def barrier(self, name: str | None = None) -> None:
        """Possible once bound."""
        self._unbound()

    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        """Possible once bound."""
        self._unbound()


def _taken(source: Plan | dict[str, Any] | str | Path, config: KptConfig) -> Plan:
    """The plan; a setting beside it would be ignored."""
    for field in sorted(config.model_fields_set - {"parallel"}):
        raise ConfigError(
            field, getattr(config, field), "would be ignored beside plan, which has settings of its own",
            "Remove one of the two",
        )  # fmt: skip
    return load_plan(source)


def _announce() -> None:
    """Let the connector of ``pytorch_lightning`` reach our message instead of its own."""
    other = sys.modules.get("pytorch_lightning.strategies")
    if other is not None:
        other.Strategy.register(KptStrategy)


# Fabric checks isinstance before it binds; the two base classes have the same methods up to there.
FabricStrategy.register(KptStrategy)
for _class in (*_TRAINER_LEAVES.values(), *_FABRIC_LEAVES.values()):
    KptStrategy.register(_class)
