"""A fit is judged by the history of fits like it, and what follows from the verdict."""

import dataclasses
import logging

import pytest
import torch

from kpt_lightning.tracking.conclusion import RegressionError, RegressionWarning
from kpt_lightning.tracking.store import RunStore
from tests.callbacks.small_fits import Net, callback_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def repeat(record, store, count=7):
    """More runs like a measured one: the same record again, with a noise of one percent."""
    for place in range(count):
        factor = 1 + 0.01 * (place % 3 - 1)
        metrics = {
            name: dataclasses.replace(metric, median=metric.median * factor) for name, metric in record.metrics.items()
        }
        store.add(dataclasses.replace(record, run_id=f"{record.run_id}-{place}", metrics=metrics))


def outcomes(callback):
    return {each.metric: each.verdict.outcome for each in callback.comparison.verdicts if each.verdict}


@pytest.fixture
def usual(fit, tmp_path):
    """A history of eight runs with steps of two milliseconds."""
    record = fit(Net(step_seconds=0.002)).record
    repeat(record, RunStore(tmp_path / "runs.sqlite"))
    return record


def test_the_second_fit_has_a_first_answer_and_no_alarm_also_by_the_same_callback(fit):
    callback = fit()
    fit(callback=callback)
    assert callback.comparison.record == callback.record
    assert callback.comparison.earlier == 1
    judged = {each.metric for each in callback.comparison.verdicts}
    assert judged >= {"step_time", "samples_per_second", "peak_memory", "final_loss", "loss_at_10"}
    assert set(outcomes(callback).values()) == {"inconclusive"}
    assert not callback.comparison.regressed


@pytest.mark.usefixtures("usual")
def test_a_slower_run_warns_and_a_slower_step_is_the_reason(fit, tmp_path):
    with pytest.warns(RegressionWarning, match="severe: step_time"):
        callback = fit(Net(step_seconds=0.05), callback_for(tmp_path))
    assert outcomes(callback)["step_time"] == outcomes(callback)["samples_per_second"] == "regression"
    assert callback.comparison.severity == "severe"


@pytest.mark.usefixtures("usual")
def test_fail_raises_after_the_record_is_stored(fit, tmp_path):
    with pytest.raises(RegressionError, match="severe: step_time"):
        fit(Net(step_seconds=0.05), callback_for(tmp_path, on_regression="fail", fail_on="severe"))
    assert len(RunStore(tmp_path / "runs.sqlite").all()) == 9


@pytest.mark.usefixtures("usual")
def test_a_function_gets_the_conclusion_and_ignore_is_silent(fit, tmp_path):
    seen = []
    fit(Net(step_seconds=0.05), callback_for(tmp_path, on_regression=seen.append))
    assert seen[0].regressed
    fit(Net(step_seconds=0.2), callback_for(tmp_path, on_regression="ignore"), rows=40)


def test_a_run_that_dies_without_memory_is_stored_with_the_cause_and_is_severe(fit, usual, tmp_path, caplog):
    callback = callback_for(tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(torch.OutOfMemoryError, match="boom"):
        fit(Net(fail_at=20, error=torch.OutOfMemoryError("boom")), callback)
    record = RunStore(tmp_path / "runs.sqlite").all()[-1]
    assert record.key == usual.key
    assert (record.status, record.details["cause"]) == ("failed", "out of memory")
    assert callback.comparison.severity == "severe"
    assert "out of memory" in caplog.text


def test_a_run_that_dies_without_memory_in_its_first_step_has_a_record_of_the_same_key(fit, usual, tmp_path):
    seen = []
    with pytest.raises(torch.OutOfMemoryError):
        fit(Net(fail_at=0, error=torch.OutOfMemoryError("boom")), callback_for(tmp_path, on_regression=seen.append))
    assert RunStore(tmp_path / "runs.sqlite").all()[-1].key == usual.key
    assert seen[0].severity == "severe"


@pytest.mark.usefixtures("usual")
def test_a_function_that_raises_does_not_hide_what_ended_the_run(fit, tmp_path, caplog):
    def broken(found):
        raise ValueError(found.severity)

    with pytest.raises(torch.OutOfMemoryError, match="boom"):
        fit(Net(fail_at=20, error=torch.OutOfMemoryError("boom")), callback_for(tmp_path, on_regression=broken))
    assert "on_regression raised" in caplog.text


def test_a_nan_in_the_middle_is_a_regression_of_a_finite_baseline(fit, tmp_path):
    fit()
    with pytest.warns(RegressionWarning, match="not finite"):
        assert fit(Net(nan_at=20), callback_for(tmp_path)).record.loss_finite is False
