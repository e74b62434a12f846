"""Letting the user's optimizer step in a trial, at rates that show, without a trace of it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.errors import KptError
from kpt_lightning.optimize.laboratory import Laboratory
from kpt_lightning.validation.loss_run import preserved_weights, room_for_weights
from kpt_lightning.validation.reading import sample
from kpt_lightning.validation.state import preserved, surrounded_by

SHARE = 0.005
"""A step moves a group by this share of its norm: 8 steps of SGD with momentum 0.9 then add up to a seventh of it."""

_WARM_UP = 1e-3
"""In place of a rate of 0, with which a warm-up begins and a step shows nothing: the default of torch's Adam."""


@contextmanager
def stepping(subject: Subject) -> Iterator[Optimizer]:
    """Let the optimizer step; all but the weights is put back: state, groups, attributes, and what its tensors hold.

    Step hooks, such as those of an average of weights, and a ``step`` on the object, such as a scheduler's counter,
    are set aside: they look at the run, in which no step was made.

    Raises:
        KptError: No optimizer is known, or it has state of a run before.
    """
    optimizer = subject.optimizer
    if optimizer is None:
        raise KptError("no optimizer is known; pass optimizer=")
    if any(optimizer.state.values()):
        raise KptError("the optimizer has state already, which steps of a trial would change")
    own = vars(optimizer)
    with surrounded_by(own), preserved(subject.model, weights=False), _without_global_hooks():
        own.pop("step", None)
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            own[name].clear()
        yield optimizer


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    hooks: list[dict[Any, Any]] = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    before = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, saved in zip(hooks, before, strict=True):
            each.clear()
            each.update(saved)


def weights_of(subject: Subject) -> list[Tensor]:
    """Parameters of the model, and those that the optimizer alone knows, each once."""
    groups = [] if subject.optimizer is None else subject.optimizer.param_groups
    found = [*subject.model.parameters(), *(each for group in groups for each in group["params"])]
    return list({id(each): each for each in found}.values())


@contextmanager
def preserved_optimizer(subject: Subject) -> Iterator[Optimizer]:
    """:func:`stepping`, with the weights put back from a copy.

    Raises:
        KptError: As :func:`stepping`, or there is no room for the copy.
    """
    weights = weights_of(subject)
    if not (room := room_for_weights(weights)):
        raise KptError(room.reason)
    with stepping(subject) as optimizer, preserved_weights(weights):
        yield optimizer


def touches_optimizer(laboratory: Laboratory, kept: Sequence[Change], change: Change) -> bool:
    """Whether ``change`` does something to the optimizer, so that its steps are part of what is judged and timed."""
    optimizer = laboratory.subject.optimizer
    if laboratory.lookup(change.candidate).stage is Stage.OPTIMIZER:
        return True
    if optimizer is None:
        return False
    found = []
    for changes in (kept, [*kept, change]):
        with laboratory.state(changes)():
            groups = [{key: id(value) for key, value in group.items()} for group in optimizer.param_groups]
            # Wrappers of step are made anew by whoever looks after a scheduler.
            own = {key: id(value) for key, value in vars(optimizer).items() if key != "step"}
            found.append((type(optimizer), groups, own))
    return found[0] != found[1]


def visible_rates(laboratory: Laboratory, share: float = SHARE) -> list[Any]:
    """Learning rate of each group at which one step of the unchanged optimizer moves it by ``share`` of its norm.

    The user's own may be a thousandth of what rounding of bf16 weights hides.
    """
    subject = laboratory.subject
    if share in laboratory.rates:
        return laboratory.rates[share]
    with stepping(subject) as optimizer, preserved_weights(weights_of(subject)) as put_back:
        groups = optimizer.param_groups
        for group in groups:
            if isinstance(group.get("lr"), float | int) and not group["lr"]:
                group["lr"] = _WARM_UP
        # Once is enough where nothing rounds; a rate far too small moves nothing that could be scaled.
        for _ in range(3):
            before = [[sample(each) for each in group["params"]] for group in groups]
            laboratory.work.loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for group, start in zip(groups, before, strict=True):
                _scale(group, share / max(_moved(group, start), share * 1e-4))
            optimizer.state.clear()
            put_back()
            for each in weights_of(subject):
                each.grad = None
        laboratory.rates[share] = [group.get("lr") for group in groups]
    return laboratory.rates[share]


def set_rates(optimizer: Optimizer, rates: Sequence[Any]) -> None:
    """Before a change is applied, so that one that spoils rates is seen."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if "lr" in group:
            group["lr"] = rate


def _scale(group: dict[str, Any], factor: float) -> None:
    if "lr" in group:
        group["lr"] = group["lr"] * factor


def _moved(group: dict[str, Any], before: list[Tensor]) -> float:
    """Share of its norm that a group moved by; 1, and so nothing to scale, where nothing in it has a gradient."""
    pairs = [
        (sample(each), start) for each, start in zip(group["params"], before, strict=True) if each.grad is not None
    ]
    if not pairs:
        return 1.0
    moved = math.hypot(*(float(torch.linalg.vector_norm(after - start)) for after, start in pairs))
    return moved / (math.hypot(*(float(torch.linalg.vector_norm(start)) for _, start in pairs)) or 1.0)
