"""What Lightning's connector knows and does not tell a strategy: what the user passed to Trainer or Fabric.

The connector calls ``strategy._configure_launcher()`` last, when accelerator, devices and nodes are known. Its own
frame is the only place that still tells ``precision=None`` from ``precision="32-true"``. Private; one contract test per
point: tests/strategies/test_contract.py.
"""

import sys
from dataclasses import dataclass
from typing import Any

from kpt_lightning.errors import ConfigError, KptError

# Class names of the connectors of Trainer and Fabric.
_CONNECTORS = ("_AcceleratorConnector", "_Connector")
_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Request:
    """The user's arguments, and the connector that holds what became of them.

    Attributes:
        connector: Lightning's connector object.
        precision: ``precision=`` as given, None where it was not.
        devices: ``devices=`` as given, "auto" where it was not.
        plugin: The precision plugin that the connector built or was given.
        plugin_given: Whether the user passed that plugin.
    """

    connector: Any
    precision: Any
    devices: Any
    plugin: Any
    plugin_given: bool

    @property
    def is_fabric(self) -> bool:
        """Fabric, not Trainer."""
        return type(self.connector).__module__.startswith("lightning.fabric")

    @property
    def owner(self) -> str:
        """Fabric or Trainer, for messages."""
        return "Fabric" if self.is_fabric else "Trainer"

    @property
    def parallel_devices(self) -> list[Any]:
        """The devices of this node, one for each process."""
        return list(self.connector._parallel_devices)

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return int(self.connector._num_nodes_flag)


def calling_request() -> Request:
    """The request of the connector that is calling.

    Raises:
        ConfigError: The caller is the connector of ``pytorch_lightning``, another package than ``lightning``.
        KptError: No connector of Lightning is calling.
    """
    connector, arguments = _find()
    if type(connector).__module__.startswith("pytorch_lightning"):
        raise ConfigError(
            "strategy", "KptStrategy", "works with lightning.pytorch.Trainer, not with pytorch_lightning.Trainer: the "
            "two packages share no classes", "Write 'from lightning.pytorch import Trainer' and LightningModule alike",
        )  # fmt: skip
    flag = "_precision_plugin_flag" if hasattr(connector, "_precision_plugin_flag") else "_precision_instance"
    given = getattr(connector, flag)
    plugin = connector.precision_plugin if hasattr(connector, "precision_plugin") else connector.precision
    return Request(connector, arguments.get("precision"), arguments.get("devices", "auto"), plugin, given is not None)


def _find() -> tuple[Any, dict[str, Any]]:
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        owner = frame.f_locals.get("self")
        if type(owner).__name__ in _CONNECTORS and frame.f_code.co_name == "__init__":
            return owner, dict(frame.f_locals)
        if frame.f_back is None:
            break
        frame = frame.f_back
    raise KptError(
        "KptStrategy was not called by the connector of lightning's Trainer or Fabric. "
        "Pass it as strategy=KptStrategy()"
    )
