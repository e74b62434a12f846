import itertools

import pytest
import torch

from kpt_lightning.measure.timer import StepTimes
from kpt_lightning.tracking import series
from kpt_lightning.tracking.series import LossTrace, StepSeries, is_mark


def steps(count):
    return [StepTimes(float(index), 0.0, None) for index in range(1, count + 1)]


@pytest.mark.parametrize(
    ("count", "warmup", "used"),
    [(1, 10, 0), (2, 10, 1), (5, 10, 1), (12, 10, 4), (30, 10, 10), (500, 10, 10), (50, 0, 0), (3, 1, 1)],
)
def test_warmup_is_at_most_a_third_of_the_run(count, warmup, used):
    run = StepSeries(warmup)
    run.add(steps(count))
    steady, warm = run.steady()
    assert warm == used
    assert [step.compute for step in steady] == list(range(used + 1, count + 1))
    assert run.first.compute == 1


def test_an_empty_run_has_no_steps():
    assert StepSeries(10).steady() == ([], 0)
    assert StepSeries(10).first is None


def test_a_long_run_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr(series, "CAPACITY", 100)
    run = StepSeries(10)
    run.add(steps(10_000))
    kept = [step.compute for step in run.steady()[0]]
    assert 50 <= len(kept) < 100
    gaps = {right - left for left, right in itertools.pairwise(kept)}
    assert len(gaps) == 1
    assert kept[-1] > 9_700


def test_marks_are_1_2_5_times_powers_of_ten():
    assert [step for step in range(1, 1001) if is_mark(step)] == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


@pytest.mark.parametrize("count", [1, 20, 63, 64, 65, 300])
def test_losses_are_kept_in_order_at_the_tail_and_at_marks(count):
    trace = LossTrace()
    for step in range(1, count + 1):
        trace.add(step, torch.tensor(float(step), requires_grad=True))
    tail, marks, finite = trace.finish()
    assert tail == [float(step) for step in range(max(1, count - 19), count + 1)]
    assert marks == {step: float(step) for step in range(1, count + 1) if is_mark(step)}
    assert finite is True


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [1, 64, 65, 150])
def test_one_loss_that_is_not_finite_is_noticed_anywhere(bad, where):
    trace = LossTrace()
    for step in range(1, 151):
        trace.add(step, bad if step == where else 1.0)
    assert trace.finish()[2] is False


def test_the_loss_of_an_accumulated_step_is_the_mean_of_its_batches():
    trace = LossTrace()
    for loss in (1.0, 3.0):
        trace.add(1, torch.tensor([loss], dtype=torch.bfloat16))
    assert trace.finish()[1] == {1: 2.0}


def test_a_loss_overwritten_in_place_keeps_its_value():
    trace, loss = LossTrace(), torch.tensor(1.0)
    trace.add(1, loss)
    loss.fill_(9.0)
    assert trace.finish()[0] == [1.0]


def test_a_loss_that_is_no_scalar_is_left_out_and_no_loss_is_unknown():
    trace = LossTrace()
    trace.add(1, torch.zeros(3))
    assert trace.finish() == ([], {}, None)
