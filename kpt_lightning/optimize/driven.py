"""Entering contexts, such as autocast, around every call of a model in a loop that nobody else drives."""

import copy
import copyreg
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kpt_lightning.candidates.subject import Subject
from kpt_lightning.errors import KptError

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_SLOT = "_kpt_subject"


Around = Callable[[Callable[[], Any]], Any]


def drive(
    model: nn.Module,
    subject: Subject,
    before: Callable[[], None] | None = None,
    around: Around | None = None,
    context: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Callable[[], None]:
    """From now on each call of ``model`` runs in ``subject``'s contexts, outside of what is compiled.

    The object gets a subclass of its own class, of the same name. A copy or a pickle of it is undriven.

    Args:
        model: Called by the user's loop.
        subject: Whose contexts are entered.
        before: Called before each call of the model.
        around: Makes each call that torch.compile does not trace: it is given a function that does it.
        context: Autocast, entered around the subject's; outputs then come back in fp32.

    Returns:
        Undoes it.

    Raises:
        KptError: It is driven already.
    """
    if is_driven(model):
        raise KptError(f"{type(model).__name__} is driven already; undo that first")
    original = type(model)
    kind = _driven(original)
    vars(model)[_SLOT] = (subject, before, around, context)
    model.__class__ = kind

    def undo() -> None:
        # Another library may have put a class of its own on the object since, as FSDP does.
        if type(model) is kind:
            model.__class__ = original
        vars(model).pop(_SLOT, None)

    return undo


def is_driven(model: nn.Module) -> bool:
    """Whether :func:`drive` is in force."""
    return _SLOT in vars(model)


def _driven(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _CLASSES:
        body = {
            "__call__": _call, "__reduce_ex__": _reduce, "__deepcopy__": _deepcopy, "__module__": original.__module__,
            "_kpt_plain": original,
        }  # fmt: skip
        made = type(original.__name__, (original,), body)
        made.__qualname__ = original.__qualname__
        made.__doc__ = original.__doc__
        _CLASSES[original] = made
    return _CLASSES[original]


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    subject, before, around, context = vars(self).get(_SLOT, (None, None, None, None))
    if subject is None:
        return self._kpt_plain.__call__(self, *args, **kwargs)
    if before is not None:
        before()
    with context() if context is not None else nullcontext(), subject.forward_context():
        if around is None or torch.compiler.is_compiling():
            output = self._kpt_plain.__call__(self, *args, **kwargs)
        else:
            output = around(functools.partial(self._kpt_plain.__call__, self, *args, **kwargs))
    # As Accelerate does: a loss computed outside of autocast must not run in bf16.
    low = context is not None or "autocast_bf16" in subject.applied
    return tree_map(_to_float32, output) if low else output


def _reduce(self: Any, protocol: int) -> Any:
    """As the class before does it, with that class, and without what is ours in the state."""
    make, given, *rest = self._kpt_plain.__reduce_ex__(self, protocol)
    given = tuple(self._kpt_plain if each is type(self) else each for each in given)
    if make is copyreg.__newobj__ and len(given) == 1:  # type: ignore[attr-defined]
        # pickle asks of __newobj__ that the class is the object's own.
        make = object.__new__
    if rest and isinstance(rest[0], dict):
        rest[0] = {name: value for name, value in rest[0].items() if name != _SLOT}
    return (make, given, *rest)


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """As the class before does it: that may have a method of its own, which asks for the class of the object."""
    kind, slot = type(self), vars(self).pop(_SLOT, None)
    self.__class__ = self._kpt_plain
    try:
        return copy.deepcopy(self, memo)
    finally:
        self.__class__ = kind
        if slot is not None:
            vars(self)[_SLOT] = slot


def _to_float32(item: Any) -> Any:
    low = isinstance(item, Tensor) and item.dtype in (torch.bfloat16, torch.float16)
    return item.float() if low else item
