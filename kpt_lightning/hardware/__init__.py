"""What this machine is: a frozen profile, the decisions that follow from it, and the peak rates with their sources.

Names are loaded when first used, so importing this package imports no torch and touches no device.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kpt_lightning.hardware.detection import detect as detect
    from kpt_lightning.hardware.device import DeviceProfile as DeviceProfile
    from kpt_lightning.hardware.peaks import Bandwidth as Bandwidth
    from kpt_lightning.hardware.peaks import Peak as Peak
    from kpt_lightning.hardware.profile import HardwareProfile as HardwareProfile

_HOME = {
    "Bandwidth": "peaks",
    "DeviceProfile": "device",
    "HardwareProfile": "profile",
    "Peak": "peaks",
    "detect": "detection",
}

__all__ = ["Bandwidth", "DeviceProfile", "HardwareProfile", "Peak", "detect"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
