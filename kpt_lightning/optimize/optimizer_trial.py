"""Whether an optimizer moves weights as it did before a change: a few steps on the very same gradients."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import KptError
from kpt_lightning.measure.statistics import median
from kpt_lightning.optimize.laboratory import Laboratory
from kpt_lightning.optimize.optimizer_steps import SHARE, set_rates, stepping, visible_rates, weights_of
from kpt_lightning.validation.gates import PARITY_ULPS, Gate, Numerics, gate
from kpt_lightning.validation.loss_run import preserved_weights, room_for_weights
from kpt_lightning.validation.reading import SEED, sample
from kpt_lightning.validation.state import seed_all

_FACTORS = (1.0, -0.5, 2.0)
"""Of the gradients, one for each step, exact in every dtype: a lost momentum or step count shows from the second on."""

_SHARE_OF_UPDATE = 1e-4
"""Kernels of one rule differ in the order of products and in how they raise betas to a power: 6e-8 in fp32, taken from
1 - 0.999 that is 6e-5 of it."""


@dataclass(frozen=True, slots=True)
class _Moved:
    """Samples of one parameter before the steps, and of what they added."""

    start: Tensor
    update: Tensor
    eps: float


def compare_steps(laboratory: Laboratory, kept: Sequence[Change], change: Change, numerics: Numerics) -> Decision:
    """Weights after a few steps with ``change`` on top of ``kept``, against those without it.

    The gradients are those of one pass, whatever the weights become: two right optimizers would part in a few steps
    where a gradient is nothing but rounding, and Adam makes whole steps of it.

    Raises:
        KptError: The optimizer cannot step in a trial.
    """
    subject = laboratory.subject
    weights = weights_of(subject)
    if not (room := room_for_weights(weights)):
        raise KptError(room.reason)
    coarsest = max(torch.finfo(each.dtype).eps for each in weights if each.is_floating_point() or each.is_complex())
    rates = visible_rates(laboratory, max(SHARE, 8 * coarsest))
    with stepping(subject) as optimizer, preserved_weights(weights) as put_back:
        set_rates(optimizer, rates)
        moved = [_steps(laboratory, changes, put_back) for changes in (kept, kept, [*kept, change])]
    plain, again, changed = moved
    names = _names(laboratory, weights)
    limits = gate(numerics, subject.compute_dtype)
    if numerics is Numerics.PRECISION:
        return _judge_coarse(plain, changed, limits)
    return _judge(names, plain, again, changed, limits)


def _steps(laboratory: Laboratory, changes: Sequence[Change], put_back: Callable[[], None]) -> list[_Moved]:
    subject = laboratory.subject
    assert subject.optimizer is not None
    with laboratory.state(changes)():
        weights = weights_of(subject)
        before = [sample(each) for each in weights]
        seed_all(SEED)
        laboratory.work.loss().backward()  # type: ignore[no-untyped-call]
        for number, factor in enumerate(_FACTORS):
            for each in weights:
                if each.grad is not None:
                    each.grad.mul_(factor / _FACTORS[number - 1] if number else factor)
            subject.optimizer.step()
        found = [
            _Moved(start, sample(each) - start, torch.finfo(each.dtype).eps)
            for each, start in zip(weights, before, strict=True)
        ]
        for each in weights:
            each.grad = None
        subject.optimizer.state.clear()
    put_back()
    return found


def _judge(
    names: Sequence[str], plain: Sequence[_Moved], again: Sequence[_Moved], changed: Sequence[_Moved], limits: Gate
) -> Decision:
    worst = math.inf
    for name, one, two, other in zip(names, plain, again, changed, strict=True):
        size, error = _norm(one.update), _norm(other.update - one.update)
        # Each of two runs rounds each weight once a step, by half a unit at most.
        rounding = len(_FACTORS) * one.eps * _norm(one.start)
        alike = (_SHARE_OF_UPDATE + PARITY_ULPS * one.eps) * size + rounding
        allowed = max(alike, limits.spreads * _norm(two.update - one.update))
        if not error <= allowed:
            text = f"{len(_FACTORS)} steps move {name} by {size:.2e}, and with the change {error:.2e} off"
            return Rejected("steps", f"{text}, {allowed:.2e} allowed")
        worst = min(worst, _db(size, error))
    return Accepted("steps", f"{len(_FACTORS)} steps move each weight alike, {worst:.1f} dB and better")


def _judge_coarse(plain: Sequence[_Moved], changed: Sequence[_Moved], limits: Gate) -> Decision:
    """Of fewer bits the median over the weights: the loss run judges what it comes to."""
    figures = [
        _db(_norm(one.update), _norm(other.update - one.update))
        for one, other in zip(plain, changed, strict=True)
        if bool(one.update.any()) or bool(other.update.any())
    ]
    middle, needed = median([min(each, 1e4) for each in figures]) if figures else math.inf, limits.median_gradient_db
    if middle is None or not middle >= needed or any(each != each for each in figures):
        return Rejected("steps", f"updates of weights have {middle:.1f} dB in the median, and {needed} are needed")
    return Accepted("steps", f"updates of weights have {middle:.1f} dB in the median")


def _db(size: float, error: float) -> float:
    if error == 0.0:
        return math.inf
    return 20 * math.log10(size / error) if size > 0 and math.isfinite(error) else -math.inf


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _names(laboratory: Laboratory, weights: Sequence[Tensor]) -> list[str]:
    known = {id(each): name for name, each in laboratory.subject.model.named_parameters()}
    return [known.get(id(each), f"a parameter of shape {tuple(each.shape)} outside of the model") for each in weights]
