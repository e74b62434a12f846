"""Giving a module other code without replacing it: its object gets a subclass of its own class.

Parameters, hooks, state-dict keys, ``isinstance`` and references that the user holds stay valid. There is one subclass
per class and forward function, so that compiled code guards on one class and not on one per module.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from kpt_lightning.candidates.compile_blocks import is_compiled
from kpt_lightning.errors import ConfigError

Forward = Callable[..., Any]
"""A function of a module, taking the module first; importable by its name, so that a changed model can be pickled."""

SLOT = "kpt_settings"
"""Attribute under which a changed module keeps what its forward function needs; never changed in place."""


class _Swapped:
    """Marks the subclasses that are made here; the second base is the class before."""


_MADE: dict[tuple[type[nn.Module], Forward], type[nn.Module]] = {}


def why_not_swap(module: nn.Module) -> str | None:
    """Why somebody else's change of this module would be lost, or None."""
    if isinstance(module, _Swapped):
        return "its code was replaced already"
    if "forward" in vars(module):
        return "its forward was replaced on the object by another library"
    if is_compiled(module):
        return "it was compiled by the user already"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at the module's calls, or changes what it gives: other code would pass that by."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def swapped_copy(module: nn.Module, forward: Forward, settings: object) -> nn.Module:
    """A second object with the changed class, over the very Parameters and children of ``module``."""
    twin = _twin(module)
    _swap(twin, forward, settings)
    return twin


def swap_all(model: nn.Module, forward: Forward, settings: Mapping[str, object], field: str) -> list[nn.Module]:
    """Change the named modules in place.

    Args:
        model: That holds them.
        forward: Their new code.
        settings: Module name to what goes into :data:`SLOT`.
        field: What names them, for the message.

    Returns:
        The modules, for :func:`swap_back`.

    Raises:
        ConfigError: A name is no module of this model, or its code was replaced before; nothing is changed then.
    """
    modules = dict(model.named_modules())
    for name in settings:
        reason = why_not_swap(modules[name]) if name in modules else "there is no such module in this model"
        if reason:
            raise ConfigError(field, name, reason, "Make a new plan")
    for name, setting in settings.items():
        _swap(modules[name], forward, setting)
    return [modules[name] for name in settings]


def swap_back(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`swap_all`."""
    for module in modules:
        if isinstance(module, _Swapped):
            vars(module).pop(SLOT, None)
            module.__class__ = type(module).__bases__[1]


def swapped_class(original: type[nn.Module], forward: Forward) -> type[nn.Module]:
    """The subclass, the same one at every call."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (original, forward), vars(self)

    if (original, forward) not in _MADE:
        body = {"forward": forward, "__reduce_ex__": reduce, "__module__": original.__module__}
        metaclass: Any = type(original)
        _MADE[original, forward] = metaclass(f"Fused{original.__name__}", (_Swapped, original), body)
    return _MADE[original, forward]


def _swap(module: nn.Module, forward: Forward, settings: object) -> None:
    kind = swapped_class(type(module), forward)
    vars(module)[SLOT] = settings
    module.__class__ = kind


def _twin(module: nn.Module) -> nn.Module:
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    return twin


def _rebuild(original: type[nn.Module], forward: Forward) -> nn.Module:
    return object.__new__(swapped_class(original, forward))
