from dataclasses import replace

from kpt_lightning.reports.side_by_side import side_by_side
from kpt_lightning.tracking.record import Metric
from tests.tracking.test_store import KEY, make


def test_all_that_is_not_equal_is_listed() -> None:
    first = make("a")
    metrics = {
        "step_time": Metric(median=0.2, unit="s", better="lower"),
        "mfu": Metric(median=0.4, unit="1", better="higher"),
    }
    key = replace(KEY, precision="fp8")
    second = replace(make("b"), key=key, metrics=metrics, environment={"torch": "3"}, plan={"precision": "bf16"})
    found = side_by_side(first, second)
    assert (found["runs"], found["same_key"]) == (["a", "b"], False)
    assert found["metrics"]["step_time"] == {"a": 0.1, "b": 0.2, "units": ["s", "s"], "change": 1.0}
    assert found["metrics"]["mfu"] == {"a": None, "b": 0.4, "units": ["", "1"], "change": None}
    assert found["differences"] == {
        "environment.torch": ("2", "3"), "key.precision": ("32-true", "fp8"), "plan.precision": ("fp8", "bf16"),
    }  # fmt: skip


def test_values_of_other_units_or_not_above_zero_have_no_ratio() -> None:
    for metric in (Metric(median=1.0, unit="ms", better="lower"), Metric(median=0.0, unit="s", better="lower")):
        changed = replace(make("b"), metrics={"step_time": metric})
        assert side_by_side(changed, make("a"))["metrics"]["step_time"]["change"] is None


def test_a_run_equals_itself() -> None:
    found = side_by_side(make("a"), make("a"))
    assert (found["same_key"], found["differences"]) == (True, {})
