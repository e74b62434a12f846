"""Lightning callbacks, loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kpt_lightning.callbacks.auto_optimize import AutoOptimizeCallback as AutoOptimizeCallback
    from kpt_lightning.callbacks.regression import RegressionCallback as RegressionCallback

_HOME = {"AutoOptimizeCallback": "auto_optimize", "RegressionCallback": "regression"}

__all__ = ["AutoOptimizeCallback", "RegressionCallback"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
