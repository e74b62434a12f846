"""The newest runs are judged by those of the same key and environment, and nothing else."""

from dataclasses import replace

import pytest

from kpt_lightning.tracking.check import check_runs
from kpt_lightning.tracking.record import Metric, RunRecord
from tests.tracking.test_store import KEY, make

STEADY = [0.1000, 0.1010, 0.0990, 0.1005, 0.0995, 0.1000, 0.1010, 0.0990, 0.1000, 0.1005]


def runs(values: list[float], better: str = "lower", start: int = 0, **changes: object) -> list[RunRecord]:
    made = []
    for number, value in enumerate(values, start=start):
        metric = Metric(median=value, unit="s", better=better)
        made.append(replace(make(f"{number}"), metrics={"step_time": metric}, **changes))
    return made


@pytest.mark.parametrize(
    ("better", "last", "outcome", "severity"),
    [
        ("lower", 0.1105, "regression", "moderate"),
        ("higher", 0.1105, "improvement", "improvement"),
        ("higher", 0.0800, "regression", "severe"),
        ("lower", 0.1002, "pass", None),
    ],
)
def test_the_direction_of_the_metric_decides(better: str, last: float, outcome: str, severity: str | None) -> None:
    (found,) = check_runs(runs([*STEADY, last], better))
    assert found.verdict is not None
    assert (found.verdict.outcome, found.verdict.severity) == (outcome, severity)
    assert (found.metric, found.unit, found.now) == ("step_time", "s", last)
    assert found.before == pytest.approx(0.1, rel=0.01)
    assert found.judged


def test_several_new_runs_are_judged_as_one() -> None:
    (found,) = check_runs(runs([*STEADY, 0.1105, 0.1100, 0.1110]), new=3)
    assert found.verdict is not None
    assert found.verdict.baseline_runs == len(STEADY)
    assert found.now == 0.1105


def test_runs_of_another_environment_are_left_out_and_told() -> None:
    history = runs(STEADY) + runs([0.12] * 6, start=20, environment={"torch": "3", "git_commit": "a"})
    history += runs([0.12], start=30, environment={"torch": "3", "git_commit": "b"})
    (found,) = check_runs(history)
    assert found.verdict is not None
    assert found.verdict.outcome == "pass"
    assert found.verdict.baseline_runs == 6
    assert found.note == "only runs since the environment changed are compared with: torch 2 -> 3"


def lacking(run: RunRecord, metric: str) -> RunRecord:
    return replace(run, metrics={name: value for name, value in run.metrics.items() if name != metric})


def with_memory(history: list[RunRecord]) -> list[RunRecord]:
    memory = Metric(median=2.0**30, unit="bytes", better="lower")
    return [replace(run, metrics={**run.metrics, "peak_memory": memory}) for run in history]


def test_a_metric_that_most_earlier_runs_have_and_the_newest_lacks_is_told() -> None:
    *older, newest = with_memory(runs([*STEADY, 0.1]))
    step_time, missing = check_runs([*older, lacking(newest, "peak_memory")])
    assert (step_time.missing, step_time.metric) == (False, "step_time")
    assert (missing.metric, missing.missing, missing.judged, missing.regressed) == ("peak_memory", True, False, False)
    assert (missing.before, missing.now, missing.verdict) == (2.0**30, None, None)
    assert missing.note == "the newest run does not have it, 10 of 10 runs before do"


@pytest.mark.parametrize(("having", "asked", "told"), [(3, None, 0), (3, ["peak_memory"], 1), (9, ["step_time"], 0)])
def test_one_that_few_had_is_told_to_who_asks_for_it(having: int, asked: list[str] | None, told: int) -> None:
    history = with_memory(runs(STEADY))
    history = [run if place < having else lacking(run, "peak_memory") for place, run in enumerate(history)]
    assert sum(each.missing for each in check_runs(history, metrics=asked)) == told


def test_a_first_run_has_no_verdict_and_a_few_are_too_little() -> None:
    (found,) = check_runs(runs([0.1]))
    assert (found.verdict, found.before, found.judged) == (None, None, False)
    (found,) = check_runs(runs([0.1, 0.1, 0.2]))
    assert not found.judged
    assert found.verdict is not None
    assert found.verdict.outcome == "inconclusive"


def test_keys_are_judged_apart_and_runs_that_failed_are_not_at_all() -> None:
    other = replace(KEY, precision="fp8")
    history = runs([*STEADY, 0.2], key=other) + runs([*STEADY, 0.1], start=50) + runs([9.0], start=90, status="failed")
    found = {each.key.precision: each.verdict.outcome for each in check_runs(history) if each.verdict}
    assert found == {"fp8": "regression", "32-true": "pass"}


def test_only_the_metrics_that_are_asked_for_are_judged() -> None:
    assert check_runs(runs([*STEADY, 0.2]), metrics=["mfu"]) == []
    assert check_runs([]) == []
    with pytest.raises(ValueError, match="new=0"):
        check_runs([], new=0)


def test_what_was_judged_by_what_is_told_by_its_ids() -> None:
    moved = [value * 2 for value in STEADY]
    (found,) = check_runs(runs([*STEADY, *moved, 0.2, 0.2]), new=2)
    assert found.base_runs == tuple(str(number) for number in range(10, 20))
    assert found.new_runs == ("20", "21")
    assert (found.baseline, found.acknowledged, found.ended) == ("", None, None)


@pytest.mark.parametrize("odd", [{"unit": "min", "better": "lower"}, {"unit": "s", "better": "higher"}])
def test_values_of_another_unit_or_direction_are_never_mixed_in(odd: dict[str, str]) -> None:
    history = [replace(run, metrics={"step_time": Metric(median=5.0, **odd)}) for run in runs([1.0] * 10)]
    (found,) = check_runs([*history, *runs([*STEADY, 0.1], start=50)])
    assert found.verdict is not None
    assert (found.verdict.outcome, len(found.base_runs)) == ("pass", 10)
    assert found.note == "only runs with step_time in 's', lower is better, are compared with"
