"""A timeline marks lasting changes within an environment and tells where environments begin."""

from dataclasses import replace

import pytest

from kpt_lightning.tracking.record import Metric
from kpt_lightning.tracking.timeline import timeline
from tests.tracking.test_check import STEADY, runs

SLOW = [value * 1.2 for value in STEADY]


def test_a_lasting_change_is_marked_at_its_first_run() -> None:
    found = timeline(runs([*STEADY, *SLOW]), "step_time")
    assert found is not None
    assert [place for place, point in enumerate(found.points) if point.change] == [10]
    change = found.points[10].change
    assert change is not None
    assert change.shift == pytest.approx(0.2, abs=0.02)
    assert (found.unit, found.better, found.points[0].environment_changes) == ("s", "lower", {})


def test_a_change_of_the_environment_is_told_once_and_is_no_change_point() -> None:
    found = timeline([*runs(STEADY), *runs(SLOW, start=50, environment={"torch": "3", "git_commit": "a"})], "step_time")
    assert found is not None
    assert not any(point.change for point in found.points)
    told = {place: point.environment_changes for place, point in enumerate(found.points) if point.environment_changes}
    assert told == {10: {"torch": ("2", "3")}}
    assert [point.environment for point in found.points] == [1] * 10 + [2] * 10


def test_hosts_that_take_turns_are_two_series() -> None:
    first = runs([*STEADY, *SLOW], environment={"host": "a"})
    second = runs([value * 3 for value in STEADY * 2], start=50, environment={"host": "b"})
    mixed = [run for pair in zip(first, second, strict=True) for run in pair]
    found = timeline(mixed, "step_time")
    assert found is not None
    assert [place for place, point in enumerate(found.points) if point.change] == [20]
    assert sum(bool(point.environment_changes) for point in found.points) == 1


def test_runs_without_the_metric_or_in_another_unit_are_left_out() -> None:
    history = runs(STEADY)
    history[3] = replace(history[3], metrics={})
    history[4] = replace(history[4], metrics={"step_time": Metric(median=9.0, unit="min", better="lower")})
    found = timeline(history, "step_time")
    assert found is not None
    assert len(found.points) == 8
    assert timeline(history, "mfu") is None
