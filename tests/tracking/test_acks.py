"""An acknowledgement lives until it expires, ends or is replaced; the log keeps all of them."""

import sqlite3
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking.acks import Ack, AckEnd, acknowledge, all_acks, end_acks, new_ack, rank
from kpt_lightning.tracking.store import RunStore

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
END = AckEnd(kind="recovered", created_at=NOW.isoformat(), run_id="9")


def ack_of(metric: str = "step_time", expires: datetime = NOW + timedelta(days=1)) -> Ack:
    return new_ack(
        key_digest="k", run_name="m", metric=metric, severity="moderate", shift=0.08, base_runs=["1", "2"],
        reason="known", expires=expires,
    )  # fmt: skip


def test_what_is_acknowledged_comes_back_equal_and_its_first_end_counts(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs.sqlite")
    first, second = ack_of(), ack_of("mfu")
    acknowledge(store, [first, second])
    assert all_acks(store) == [first, second]
    end_acks(store, [(first, END)])
    end_acks(store, [(first, AckEnd(kind="worsened", created_at="2026-07-01T00:00:00+00:00", run_id="10"))])
    ended, living = all_acks(store)
    assert ended.end == END
    assert (ended.state(NOW), living.state(NOW)) == ("recovered", "live")


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))])
@pytest.mark.parametrize(("seconds", "state"), [(-1, "live"), (0, "expired"), (1, "expired")])
def test_expiry_is_a_moment_whatever_the_zone_of_the_host(zone: timezone, seconds: int, state: str) -> None:
    ack = ack_of(expires=NOW.astimezone(zone))
    assert ack.state((NOW + timedelta(seconds=seconds)).astimezone(zone)) == state


def test_a_later_one_of_the_same_metric_replaces_an_earlier_one(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs.sqlite")
    acknowledge(store, [ack_of()])
    acknowledge(store, [ack_of("mfu"), replace(ack_of(), key_digest="other"), ack_of(expires=NOW + timedelta(days=9))])
    assert [each.state(NOW) for each in all_acks(store)] == ["replaced", "live", "live", "live"]


def test_severities_are_ranked() -> None:
    assert [rank(each) for each in (None, "improvement", "minor", "moderate", "severe")] == [-1, -1, 0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "event"),
    [("acknowledged", "{}"), ("acknowledged", "["), ("recovered", '{"ack_id": "unknown"}'), ("recovered", "{}")],
)
def test_an_entry_that_cannot_be_understood_is_refused(tmp_path: Path, kind: str, event: str) -> None:
    store = RunStore(tmp_path / "runs.sqlite").open()
    connection = sqlite3.connect(tmp_path / "runs.sqlite")
    connection.execute("INSERT INTO kpt_acks (kind, event) VALUES (?, ?)", (kind, event))
    connection.commit()
    connection.close()
    with pytest.raises(HistoryError, match=r"damaged|form of this version"):
        all_acks(store)
