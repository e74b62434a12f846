"""Entering contexts, such as autocast, around every call of a model in a loop that nobody else drives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kpt_lightning.candidates.subject import Subject

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_SLOT = "_kpt_subject"


def drive(model: nn.Module, subject: Subject, before: Callable[[], None] | None = None) -> Callable[[], None]:
    """From now on each call of ``model`` runs in ``subject``'s contexts, outside of what is compiled.

    The object gets a subclass of its own class, of the same name. A copy or a pickle of it is undriven.

    Args:
        model: Called by the user's loop.
        subject: Whose contexts are entered.
        before: Called before each call of the model.

    Returns:
        Undoes it.
    """
    original = type(model)
    vars(model)[_SLOT] = (subject, before)
    model.__class__ = _driven(original)

    def undo() -> None:
        model.__class__ = original
        vars(model).pop(_SLOT, None)

    return undo


def _driven(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _CLASSES:
        body = {"__call__": _call, "__reduce_ex__": _reduce, "__module__": original.__module__, "_kpt_plain": original}
        made = type(original.__name__, (original,), body)
        made.__qualname__ = original.__qualname__
        made.__doc__ = original.__doc__
        _CLASSES[original] = made
    return _CLASSES[original]


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    subject, before = vars(self)[_SLOT]
    if before is not None:
        before()
    with subject.forward_context():
        output = self._kpt_plain.__call__(self, *args, **kwargs)
    # As Accelerate does: a loss computed outside of autocast must not run in bf16.
    return tree_map(_to_float32, output) if "autocast_bf16" in subject.applied else output


def _reduce(self: Any, protocol: int) -> Any:
    state = {name: value for name, value in vars(self).items() if name != _SLOT}
    return _undriven, (self._kpt_plain,), state


def _undriven(original: type[nn.Module]) -> nn.Module:
    return original.__new__(original)


def _to_float32(item: Any) -> Any:
    low = isinstance(item, Tensor) and item.dtype in (torch.bfloat16, torch.float16)
    return item.float() if low else item
