"""Import of the modules that hold Triton kernels, at their first launch."""

from functools import cache
from importlib import import_module
from typing import Any

from kpt_lightning.optional import TRITON


@cache
def triton_module(name: str) -> Any:
    """``kpt_lightning.kernels.<name>_triton``; looked up once, since an operator asks at every call.

    Args:
        name: Of the module with the reference.

    Raises:
        MissingDependencyError: Triton is not installed.
    """
    TRITON.require("kpt_lightning.kernels on CUDA")
    return import_module(f"kpt_lightning.kernels.{name}_triton")
