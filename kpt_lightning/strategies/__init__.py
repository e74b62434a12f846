"""Strategies for Lightning's Trainer and Fabric."""

from kpt_lightning.strategies.fabric import KptFabricDDP, KptFabricFSDP2, KptFabricSingleDevice
from kpt_lightning.strategies.fsdp2 import KptFSDP2
from kpt_lightning.strategies.leaves import KptDDP, KptSingleDevice
from kpt_lightning.strategies.strategy import KptStrategy

__all__ = [
    "KptDDP", "KptFSDP2", "KptFabricDDP", "KptFabricFSDP2", "KptFabricSingleDevice", "KptSingleDevice", "KptStrategy",
]  # fmt: skip
