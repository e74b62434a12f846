"""The doctor's figures are those of the gate itself, and every oddity of a history is said."""

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kpt_lightning.tracking.acks import acknowledge, new_ack
from kpt_lightning.tracking.baselines import new_baseline, pin
from kpt_lightning.tracking.gate import compare
from kpt_lightning.tracking.health import examine, smallest_visible_shift
from kpt_lightning.tracking.schema import SCHEMA_VERSION
from kpt_lightning.tracking.store import RunStore
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_store import KEY, make

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def level(values: list[float]) -> float:
    """The gate's own level, from the shift that it reports."""
    probe = compare(values, [values[0]])
    return values[0] / (1 + probe.shift)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("values", [STEADY, STEADY * 3, [10.0, 10.4, 9.8, 10.1, 9.9]])
def test_the_gate_decides_just_beyond_the_smallest_visible_shift_and_not_before(values: list[float], new: int) -> None:
    shift = smallest_visible_shift(values, new)
    assert shift is not None
    for factor, outcome in ((1.001, "regression"), (0.999, "other")):
        seen = compare(values, [level(values) * (1 + shift * factor)] * new)
        assert (seen.outcome == "regression") == (outcome == "regression")


def test_too_few_runs_and_a_level_of_zero_see_nothing() -> None:
    assert smallest_visible_shift(STEADY[:4], 1) is None
    assert smallest_visible_shift([0.0] * 10, 1) is None


def test_a_healthy_history_is_described(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs.sqlite")
    few = replace(KEY, precision="fp8")
    for hour, record in enumerate([*runs(STEADY), make("failed", status="failed"), make("few", key=few)]):
        store.add(replace(record, created_at=f"2026-01-01T{hour:02}:00:00+00:00"))
    pin(store, [new_baseline("main", runs(STEADY))])
    found = examine(store, NOW)
    assert (found.schema_version, found.integrity, found.journal_mode) == (SCHEMA_VERSION, "ok", "wal")
    assert (found.problems, found.live_acks, found.baselines) == ((), (), {"main": 1})
    whole, short = found.keys
    assert (whole.statuses, whole.comparable, whole.judgeable) == ({"finished": 10, "failed": 1}, 10, True)
    assert (short.judgeable, short.metrics[0].visible) == (False, {})
    (metric,) = whole.metrics
    assert metric.level == pytest.approx(0.1, rel=0.01)
    assert metric.noise == pytest.approx(0.008, rel=0.5)
    assert metric.visible[1] > metric.visible[3] > 0.0
    assert found.to_dict()["keys"][0]["digest"] == KEY.digest


def test_only_the_newest_environment_and_level_tell_the_noise(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs.sqlite")
    moved = [value * 1.5 for value in STEADY]
    for record in [*runs([9.0, 1.0, 5.0], environment={"torch": "1"}), *runs([*STEADY, *moved], start=50)]:
        store.add(record)
    (key,) = examine(store, NOW).keys
    assert (key.comparable, key.metrics[0].runs) == (20, 10)
    assert key.metrics[0].level == pytest.approx(0.15, rel=0.01)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        (["2026-01-01T00:00:00+00:00", "2025-12-31T23:58:00+00:00"], ["run 1: .*went back"]),
        (["2026-01-01T00:00:00+00:00", "2025-12-31T23:59:30+00:00"], []),
        (["2026-01-01T00:00:00+00:00", "2026-01-01T01:00:00+02:00"], ["run 1: .*went back"]),
        (["2026-06-01T00:02:00+00:00"], ["run 0: .*still to come"]),
        (["yesterday"], ["run 0: created_at='yesterday' is no time"]),
        (["2026-01-01T00:00:00+00:00"] * 2, ["run 1: equal to run 0"]),
    ],
)
def test_clocks_that_jump_and_runs_stored_twice_are_told(tmp_path: Path, times: list[str], says: list[str]) -> None:
    store = RunStore(tmp_path / "runs.sqlite")
    values = [0.1, 0.1 if len(set(times)) < len(times) else 0.2]
    for record, when in zip(runs(values[: len(times)]), times, strict=True):
        store.add(replace(record, created_at=when))
    found = examine(store, NOW).problems
    assert len(found) == len(says)
    for sentence, expected in zip(found, says, strict=True):
        assert re.search(expected, sentence)


def test_acknowledgements_about_to_end_are_told(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs.sqlite")
    acks = [
        new_ack(
            key_digest="k",
            run_name="m",
            metric=metric,
            severity="minor",
            shift=0.03,
            base_runs=[],
            reason="known",
            expires=NOW + timedelta(days=days),
        )
        for metric, days in (("a", -1), ("b", 1), ("c", 30))
    ]
    acknowledge(store, acks)
    found = examine(store, NOW)
    assert [ack.metric for ack in found.live_acks] == ["b", "c"]
    assert found.expiring_acks == (acks[1].ack_id,)


def test_a_server_is_described_too(postgres: str) -> None:
    found = examine(RunStore(postgres), NOW)
    assert (found.integrity, found.journal_mode) == ("left to the server", "")
