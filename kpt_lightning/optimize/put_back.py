"""A trial leaves no trace, also where a candidate's own undo fails: what it left is put back, and told."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kpt_lightning.candidates.subject import Subject
from kpt_lightning.errors import KptError
from kpt_lightning.validation.reachable import survey
from kpt_lightning.validation.state import preserved
from kpt_lightning.validation.written import watch

_Look = dict[str, Any]

_NAMED = 3
"""Differences that a message names."""


class UnrestoredError(KptError):
    """The model is not what it was: nothing further may be tried on it, and nothing trained."""


@contextmanager
def put_back(subject: Subject) -> Iterator[Callable[[], str]]:
    """Whatever happens inside, model and optimizer are afterwards what they were.

    Yields:
        Names what differs now, a few of it; empty where nothing does.

    Raises:
        UnrestoredError: It could not be put back: a weight has other values, or other memory.
    """
    before = _look(subject)
    weights = watch(list(subject.model.parameters()), counters=False)
    with ExitStack() as undo:
        undo.enter_context(preserved(subject.model, weights=False))
        undo.callback(_around(subject))
        yield lambda: _difference(before, _look(subject))
    left = _difference(before, _look(subject))
    if weights() is not None:
        left = "values of weights"
    if left:
        raise UnrestoredError(
            f"a trial has left the model changed ({left}), and it could not be put back. Make the model anew and "
            "train it with a plan by rules"
        )


def _around(subject: Subject) -> Callable[[], None]:
    """Puts back what ``preserved`` does not know: the optimizer, but not its state, and contexts of the subject."""
    optimizer, contexts = subject.optimizer, list(subject.contexts)
    kind: Any = type(optimizer)
    found = survey({} if optimizer is None else vars(optimizer))

    def restore() -> None:
        subject.contexts[:] = contexts
        if optimizer is not None and type(optimizer) is not kind:
            optimizer.__class__ = kind
        for back in found.restore:
            back()

    return restore


def _look(subject: Subject) -> _Look:
    """Every object that the model and what surrounds it hold, by place."""
    found: _Look = {"contexts": list(subject.contexts)}
    for name, module in subject.model.named_modules():
        _add(found, name or type(module).__name__, type(module), vars(module))
    for name, each in subject.model.named_parameters():
        found[f"requires_grad of {name}"] = each.requires_grad
    if subject.optimizer is not None:
        own = {key: value for key, value in vars(subject.optimizer).items() if key not in ("state", "param_groups")}
        _add(found, "optimizer", type(subject.optimizer), own)
        for number, group in enumerate(subject.optimizer.param_groups):
            _add(found, f"optimizer.param_groups.{number}", dict, group)
    return found


def _add(found: _Look, name: str, kind: type, attributes: dict[str, Any]) -> None:
    found[f"class of {name}"] = kind
    for key, value in attributes.items():
        # Hooks, parameters and children are dictionaries that stay while their content changes.
        found[f"{name}.{key}"] = dict(value) if isinstance(value, dict) else value


def _difference(before: _Look, now: _Look) -> str:
    names = [name for name in before.keys() | now.keys() if not _same(before.get(name), now.get(name))]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(sorted(names)[:_NAMED]) + more


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(a is b for a, b in zip(one.values(), other.values(), strict=True))
    if one is other:
        return True
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and isinstance(one, bool | int | float | str) and one == other
