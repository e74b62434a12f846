"""Pins are appended and the newest holds; a base that moves is judged before."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking.baselines import moves, new_baseline, pin, pinned, pins
from kpt_lightning.tracking.events import author
from kpt_lightning.tracking.record import Metric
from kpt_lightning.tracking.store import RunStore
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_store import KEY


def test_the_newest_pin_of_a_name_and_key_holds_and_no_older_one_is_lost(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs.sqlite")
    first, second = new_baseline("main", runs(STEADY), "first"), new_baseline("main", runs(STEADY, start=50))
    release = new_baseline("release", runs(STEADY))
    other = new_baseline("main", runs(STEADY, key=replace(KEY, precision="fp8")))
    pin(store, [first, release])
    pin(store, [second, other])
    assert pinned(store, "main") == {KEY.digest: second, other.key_digest: other}
    assert pinned(store, "release") == {KEY.digest: release}
    assert pinned(store, "none") == {}
    assert pins(store) == [first, release, second, other]
    assert first.author == author()
    assert (first.reason, first.run_ids[:2]) == ("first", ("0", "1"))


def test_all_pins_are_stored_or_none(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs.sqlite").open()
    connection = sqlite3.connect(tmp_path / "runs.sqlite")
    connection.execute(
        "CREATE TRIGGER full BEFORE INSERT ON kpt_baselines WHEN NEW.name = 'b' BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    connection.close()
    with pytest.raises(HistoryError):
        pin(store, [new_baseline("a", runs(STEADY)), new_baseline("b", runs(STEADY))])
    assert pins(store) == []


@pytest.mark.parametrize("event", ["{", json.dumps({"name": "main"}), "[]"])
def test_a_pin_that_cannot_be_understood_is_refused(tmp_path: Path, event: str) -> None:
    store = RunStore(tmp_path / "runs.sqlite").open()
    connection = sqlite3.connect(tmp_path / "runs.sqlite")
    connection.execute("INSERT INTO kpt_baselines (name, event) VALUES ('main', ?)", (event,))
    connection.commit()
    connection.close()
    with pytest.raises(HistoryError, match=r"damaged|form of this version"):
        pinned(store, "main")


@pytest.mark.parametrize(
    ("now", "better", "outcome", "severity"),
    [
        ([0.112, 0.111, 0.113, 0.112, 0.111], "lower", "regression", "moderate"),
        ([0.112, 0.111, 0.113, 0.112, 0.111], "higher", "improvement", "improvement"),
        ([0.100, 0.101, 0.099, 0.100, 0.100], "lower", "pass", None),
    ],
)
def test_a_move_is_judged_by_its_direction(now: list[float], better: str, outcome: str, severity: str | None) -> None:
    (move,) = moves(runs(STEADY, better), runs(now, better, start=50, environment={"torch": "3"}))
    assert (move.metric, move.verdict.outcome, move.verdict.severity) == ("step_time", outcome, severity)
    assert move.environment == {"torch": ("2", "3")}


def test_only_runs_that_were_not_pinned_before_tell_of_a_move() -> None:
    before = runs(STEADY)
    slow = runs([0.15], start=50)
    assert moves(before, before[2:]) == []
    assert moves([], slow) == []
    (move,) = moves(before, [*before[1:], *slow])
    assert move.verdict.severity == "severe"


def test_a_metric_without_a_past_or_in_another_unit_is_no_move() -> None:
    fresh = runs([0.5], start=50)
    fresh[0] = replace(fresh[0], metrics={"step_time": Metric(median=9.0, unit="min", better="lower")})
    assert moves(runs(STEADY), fresh) == []
