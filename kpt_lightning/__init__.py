"""Plug hardware optimizations into the PyTorch trainer that you already have, and prove that they ran.

Names are loaded when first used: importing this package imports neither torch nor Lightning and touches no device.
"""

import random
from importlib import import_module
from typing import TYPE_CHECKING

from kpt_lightning.registration import register

if TYPE_CHECKING:
    from kpt_lightning.callbacks.auto_optimize import AutoOptimizeCallback as AutoOptimizeCallback
    from kpt_lightning.callbacks.regression import RegressionCallback as RegressionCallback
    from kpt_lightning.config import KptConfig as KptConfig
    from kpt_lightning.config import Level as Level
    from kpt_lightning.optimize.auto import auto_optimize as auto_optimize
    from kpt_lightning.optimize.auto import plan_of as plan_of
    from kpt_lightning.optimize.auto import restore as restore
    from kpt_lightning.optimize.plan import Plan as Plan
    from kpt_lightning.plugins.precision import KptFabricPrecision as KptFabricPrecision
    from kpt_lightning.plugins.precision import KptPrecision as KptPrecision
    from kpt_lightning.strategies import KptDDP as KptDDP
    from kpt_lightning.strategies import KptFSDP2 as KptFSDP2
    from kpt_lightning.strategies import KptSingleDevice as KptSingleDevice
    from kpt_lightning.strategies import KptStrategy as KptStrategy
    from kpt_lightning.validation.model import validate_model as validate_model
    from kpt_lightning.validation.settings import validate_config as validate_config

__version__ = "0.1.0"

_HOME = {
    "AutoOptimizeCallback": "callbacks.auto_optimize",
    "KptConfig": "config",
    "KptDDP": "strategies",
    "KptFSDP2": "strategies",
    "KptFabricPrecision": "plugins.precision",
    "KptPrecision": "plugins.precision",
    "KptSingleDevice": "strategies",
    "KptStrategy": "strategies",
    "Level": "config",
    "Plan": "optimize.plan",
    "RegressionCallback": "callbacks.regression",
    "auto_optimize": "optimize.auto",
    "plan_of": "optimize.auto",
    "restore": "optimize.auto",
    "validate_config": "validation.settings",
    "validate_model": "validation.model",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        # rich draws from Python's generator when it is imported, which may be after the user's seed.
        state = random.getstate()
        try:
            return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        finally:
            random.setstate(state)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
