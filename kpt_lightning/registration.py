"""Makes ``strategy="kpt"`` known to Lightning, whichever of the two packages is imported first.

Lightning has no entry point for strategies, and importing it here would cost every ``import kpt_lightning`` seconds. So
the name is registered when Lightning's registry is there: now, or right after it is imported.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# Module that holds a registry -> the registry's name in it.
_REGISTRIES = {"lightning.fabric.strategies": "STRATEGY_REGISTRY", "lightning.pytorch.strategies": "StrategyRegistry"}


def register() -> None:
    """Register the name where Lightning is imported, and wait for it where it is not. Idempotent."""
    for name in _REGISTRIES:
        if name in sys.modules:
            _register_in(sys.modules[name])
        elif not any(isinstance(finder, _Waiting) and finder.target == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiting(name))


def _register_in(module: ModuleType) -> None:
    registry = getattr(module, _REGISTRIES[module.__name__], None)
    # Lightning is being imported further up the stack and has no registry yet: its own import comes back here.
    if registry is not None and "kpt" not in registry:
        registry.register("kpt", _make, description="KptStrategy: binds to a device, DDP or FSDP2 by device count")


def _make(**settings: Any) -> Any:
    from kpt_lightning.strategies import KptStrategy

    return KptStrategy(**settings)


class _Waiting(MetaPathFinder):
    """Stands in the way of one import, once."""

    def __init__(self, target: str) -> None:
        self.target = target

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The real spec, with a loader that registers afterwards; then this finder is gone."""
        if fullname != self.target:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, real: Loader) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        _register_in(module)
