"""Records are read as they were written, by this version and by those before."""

import json

import pytest

from kpt_lightning.errors import HistoryError
from kpt_lightning.measure import statistics
from kpt_lightning.tracking.record import QUANTILE_DIGITS, QUANTILES, Metric, RunRecord

WITHOUT_QUANTILES = """
{"run_id": "5f2c", "created_at": "2026-11-23T19:04:51.120+00:00", "key": {"name": "m", "model": "a", "config": "b",
 "device": "cpu", "device_count": 1, "strategy": "single", "precision": "32-true"}, "status": "finished",
 "metrics": {"step_time": {"median": 0.1, "unit": "s", "better": "lower", "n": 30, "n_effective": 21.5, "mad": 0.002},
             "peak_memory": {"median": 1048576.0, "unit": "bytes", "better": "lower", "n": 1, "n_effective": 1.0,
                             "mad": null}},
 "environment": {"torch": "2.10.0"}, "loss_at": {"1": 2.5}, "loss_finite": true, "details": {"clock": "host"},
 "notes": ["short"], "plan": null}
"""
"""As stored before a metric had quantiles."""

STEPS = [0.1 + 0.0001 * ((7 * number) % 40) for number in range(200)]


def test_a_record_of_an_older_version_is_read_and_written_as_it_was() -> None:
    data = json.loads(WITHOUT_QUANTILES)
    record = RunRecord.from_dict(data)
    assert record.metrics["step_time"].quantiles is None
    assert record.to_dict() == data


def test_the_quantiles_of_the_steps_survive_json_and_take_little_of_it() -> None:
    metric = Metric.of(STEPS, "s", "lower")
    assert metric is not None
    assert metric.quantiles is not None
    exact = [statistics.quantile(STEPS, level) for level in QUANTILES]
    assert metric.quantiles == pytest.approx(exact, rel=10.0**-QUANTILE_DIGITS)
    assert metric.quantiles[QUANTILES.index(0.5)] == pytest.approx(metric.median, rel=10.0**-QUANTILE_DIGITS)
    text = json.dumps(metric.to_dict())
    assert len(text) - len(json.dumps(metric.to_dict() | {"quantiles": None})) < 60
    assert Metric.from_dict(json.loads(text)) == metric


@pytest.mark.parametrize("values", [[0.1], [1.0, 2.0, float("inf")]])
def test_where_steps_have_no_quantiles_none_are_kept(values: list[float]) -> None:
    metric = Metric.of(values, "s", "lower")
    assert metric is not None
    assert metric.quantiles is None
    assert "quantiles" not in metric.to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"p99": 0.2},
        {"quantiles": [0.1, 0.2]},
        {"quantiles": [5, 4, 3, 2, 1]},
        {"quantiles": "abcde!"},
        {"quantiles": 3},
    ],
)
def test_a_metric_of_another_form_is_refused_with_what_to_do(changes: dict[str, object]) -> None:
    """So does an older version with quantiles: it never judges by a record that it reads in part."""
    data = json.loads(WITHOUT_QUANTILES)
    data["metrics"]["step_time"] |= changes
    with pytest.raises(HistoryError, match=r"run='5f2c'.*Read it with the version of kpt-lightning that wrote it"):
        RunRecord.from_dict(data)
