"""What a pass can change beside the model: the loss, the batch, and parameters that only the optimizer knows."""

import functools
import inspect
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from kpt_lightning.candidates.subject import Subject
from kpt_lightning.optimize.work import Work
from kpt_lightning.validation.workload import named_tensors


def surroundings(subject: Subject, work: Work) -> list[object]:
    """For ``validation.state.surrounded_by``.

    Args:
        subject: With its optimizer.
        work: With its batch and, where it has one, its ``loss_fn``.
    """
    groups = [] if subject.optimizer is None else subject.optimizer.param_groups
    return [
        *(tensor for _, tensor in named_tensors(work.batch)),
        *(each for group in groups for each in group["params"]),
        *_parts_of(getattr(work, "loss_fn", None)),
    ]


def _parts_of(function: Any) -> Iterator[object]:
    """Modules and tensors that a loss function is, is bound to, or names."""
    while isinstance(function, functools.partial):
        yield from (
            each for each in (*function.args, *function.keywords.values()) if isinstance(each, nn.Module | Tensor)
        )
        function = function.func
    if isinstance(function, MethodType):
        yield function.__self__
        function = function.__func__
    if isinstance(function, FunctionType):
        known = inspect.getclosurevars(function)
        named = (*known.nonlocals.values(), *known.globals.values())
        yield from (each for each in named if isinstance(each, nn.Module | Tensor))
    elif isinstance(function, nn.Module):
        yield function
    elif function is not None and hasattr(function, "__dict__"):
        # An object of a user's own class with __call__: the survey knows which it may walk.
        yield function
