"""The state that others are compared with: models that are random, not repeatable, or without numbers."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.errors import KptError
from kpt_lightning.optimize.baseline import Baseline, take_baseline
from kpt_lightning.optimize.outcome import Outcome
from kpt_lightning.optimize.search import search
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.workload import Workload
from tests.optimize.faults import Made, Tiny, batch, faster, set_on, subject, with_nap

NAP = 0.06


def taken(model: nn.Module) -> Baseline:
    return take_baseline(subject(model, batch()), Workload(model, batch()).loss_and_outputs)


def run(model: nn.Module, *candidates: Any) -> Outcome:
    return search(subject(model, batch()), Workload(model, batch()), max_seconds=60, pool=candidates, rounds=6)


class Scaled(Tiny):
    """Every output is multiplied by a factor."""

    def __init__(self, factor: Callable[[], float], nap: float = 0.0) -> None:
        super().__init__(nap=nap)
        self.factor, self.sign = factor, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor() * self.sign


def unseeded() -> float:
    return random.SystemRandom().uniform(0.5, 1.5)


def seeded() -> float:
    return float(torch.rand(()) + 0.5)


def like_atomics() -> float:
    """As sums in another order: a unit or two in the last place of fp32."""
    return 1.0 + random.SystemRandom().randint(-2, 2) * 2.0**-22


def halved(model: Any) -> Callable[[], None]:
    return set_on(model, "sign", -0.5)


def test_a_model_that_no_seed_makes_repeatable_is_told_and_no_change_of_its_numbers_is_kept() -> None:
    model = Scaled(unseeded, NAP)
    with pytest.warns(UserWarning, match=r"kpt: the model gives other numbers in each run with equal seeds \(the loss"):
        outcome = run(model, Made("fault", with_nap(halved)), Made("honest", faster))
    assert outcome.changes == []
    for trial in outcome.trials:
        assert trial.reason.startswith("numbers differ: the model gives other numbers in each run with equal seeds")
    assert (model.sign, model.nap) == (1.0, NAP)
    assert all(each.grad is None for each in model.parameters())


def test_what_changes_no_numbers_may_still_be_tried_there() -> None:
    with pytest.warns(UserWarning, match="equal seeds"):
        found = taken(Scaled(unseeded))
    assert [numerics for numerics in Numerics if not found.why_not(numerics)] == [Numerics.SAME]
    assert found.rounding.loss < 60


@pytest.mark.parametrize("factor", [seeded, like_atomics, lambda: 1.0])
def test_seeds_and_sums_in_another_order_are_no_reason(factor: Callable[[], float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = taken(Scaled(factor))
    assert found.unsteady == ""
    assert min(found.rounding.loss, found.rounding.middle_output) > 90
    assert not any(found.why_not(numerics) for numerics in Numerics)


def test_a_fault_is_rejected_where_sums_come_in_another_order_each_time() -> None:
    outcome = run(Scaled(like_atomics, NAP), Made("fault", with_nap(halved)))
    assert outcome.changes == []
    assert outcome.trials[0].reason.startswith("numbers differ: loss has")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_model_without_a_finite_loss_is_not_optimized(value: float) -> None:
    model = Scaled(lambda: value, NAP)
    with pytest.raises(KptError, match=rf"the loss of the unchanged model is {value}.*finite loss first"):
        run(model, Made("honest", faster))
    assert model.nap == NAP
    assert all(each.grad is None for each in model.parameters())


def test_a_gradient_without_numbers_is_named() -> None:
    class Root(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            # The slope of a root at zero.
            return super().forward(x) + (self.layers[1].up.bias * 0).square().sum().sqrt()  # type: ignore[union-attr,operator]

    with pytest.raises(KptError, match=r"the gradient of 'layers.1.up.bias' holds NaN"):
        taken(Root())
