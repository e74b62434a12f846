"""Who only reads a history makes none, and needs no right to write it."""

from pathlib import Path

import pytest

from kpt_lightning.tracking.acks import acknowledge, all_acks, new_ack
from kpt_lightning.tracking.events import utc_now
from kpt_lightning.tracking.expiry import expiry
from kpt_lightning.tracking.store import RunStore
from tests.cli.kpt_command import kpt, regress
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_sqlite import unwritable
from tests.tracking.test_store import KEY

READING = (
    ["check"], ["history"], ["compare", "a", "b"], ["report"], ["doctor"], ["export", "runs.jsonl"], ["accept"],
    ["ack", "--list"], ["ack", "step_time", "--reason", "r", "--expires", "1d"],
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Eleven runs in a folder of its own."""
    path = tmp_path / "team" / "runs.sqlite"
    for record in runs([*STEADY, 0.1]):
        RunStore(path).add(record)
    return path


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_a_mistyped_path_is_told_and_nothing_is_made(tmp_path: Path, command: list[str]) -> None:
    wrong = tmp_path / "new" / "rnus.sqlite"
    done = regress(wrong, *command)
    assert (done.status, done.out) == (3, "")
    assert done.err == f"kpt: no history at {str(wrong)!r}; check --store, or record a run first\n"
    assert list(tmp_path.iterdir()) == []


def test_who_writes_makes_it(tmp_path: Path, place: Path) -> None:
    assert regress(tmp_path / "new" / "runs.sqlite", "record", "--name", "m", "step_time=0.1").status == 0
    assert regress(place, "export", str(tmp_path / "runs.jsonl")).status == 0
    assert regress(tmp_path / "other" / "runs.sqlite", "import", str(tmp_path / "runs.jsonl")).status == 0
    assert len(RunStore(tmp_path / "other" / "runs.sqlite").all()) == 11


def test_a_server_that_is_out_of_reach_is_no_missing_history() -> None:
    assert regress("postgresql://kpt@127.0.0.1:1/none", "check").status == 4


@pytest.mark.parametrize("what", ["file", "directory"])
def test_every_reading_command_works_on_a_history_that_cannot_be_written(
    tmp_path: Path, place: Path, what: str
) -> None:
    commands = (
        ["check"], ["history"], ["compare", "9", "10"], ["report", "--output", str(tmp_path / "report.html")],
        ["doctor"], ["export", str(tmp_path / "runs.jsonl")], ["ack", "--list"],
    )  # fmt: skip
    with unwritable(place if what == "file" else place.parent):
        for command in commands:
            done = regress(place, *command)
            assert (done.status, done.err) == (0, ""), command
        assert "read-only" in regress(place, "doctor").out
        assert [path.name for path in place.parent.iterdir()] == ["runs.sqlite"]
        assert regress(place, "record", "--name", "m", "step_time=0.1").status == 4
        assert regress(place, "accept").status == 4


def test_an_acknowledgement_that_ended_is_told_where_it_cannot_be_stored(place: Path) -> None:
    known = new_ack(
        key_digest=KEY.digest, run_name="m", metric="step_time", severity="moderate", shift=0.1,
        base_runs=[str(number) for number in range(10)], reason="known", expires=expiry("1d"),
    )  # fmt: skip
    acknowledge(RunStore(place), [known])
    with unwritable(place):
        done = kpt("regress", "check", "--store", str(place))
    assert done.status == 0
    assert "is read-only: not stored that these acknowledgements ended: m step_time" in done.err
    assert all_acks(RunStore(place))[0].state(utc_now()) == "live"
    assert regress(place, "check").err == ""
    assert all_acks(RunStore(place))[0].state(utc_now()) == "recovered"
