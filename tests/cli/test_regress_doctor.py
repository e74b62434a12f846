"""``kpt regress doctor``: a healthy history is described, a damaged one has the status of an unreadable one."""

import json
import sqlite3
from pathlib import Path

from kpt_lightning.tracking.schema import SCHEMA_VERSION
from kpt_lightning.tracking.store import RunStore
from tests.cli.kpt_command import regress
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_store import KEY


def history_of(place: Path, values: list[float]) -> Path:
    for record in runs(values):
        RunStore(place).add(record)
    return place


def test_it_says_what_could_be_seen(tmp_path: Path) -> None:
    place = history_of(tmp_path / "runs.sqlite", [*STEADY, 0.111])
    regress(place, "accept", "--reason", "r")
    regress(place, "ack", "step_time", "--name", "m", "--reason", "known", "--expires", "1d")
    done = regress(place, "doctor")
    assert (done.status, done.err) == (0, "")
    for part in ("integrity ok", "journal wal", "main (1 keys)", "seen by 3 new runs", "UTC, soon: known", KEY.digest):
        assert part in done.out
    data = json.loads(regress(place, "doctor", "--json").out)
    (key,) = data["keys"]
    assert (data["schema_version"], key["judgeable"], key["statuses"]) == (SCHEMA_VERSION, True, {"finished": 11})
    assert key["metrics"][0]["visible"]["1"] > key["metrics"][0]["visible"]["3"]


def test_keys_with_too_few_runs_are_told(tmp_path: Path) -> None:
    done = regress(history_of(tmp_path / "runs.sqlite", STEADY[:3]), "doctor")
    assert done.status == 0
    assert "3 comparable, too few to judge by" in done.out
    RunStore(tmp_path / "empty.sqlite").open()
    assert regress(tmp_path / "empty.sqlite", "doctor").status == 0


def test_a_damaged_history_is_an_unreadable_one(tmp_path: Path) -> None:
    place = history_of(tmp_path / "runs.sqlite", STEADY * 20)
    connection = sqlite3.connect(place)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    root = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ix_kpt_runs_key_digest'").fetchone()[0]
    size = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.close()
    with place.open("r+b") as file:
        file.seek((root - 1) * size + size // 2)
        file.write(b"\xff" * (size // 2))
    done = regress(place, "doctor")
    assert done.status == 4
    assert "finds it damaged" in done.err or "cannot be read" in done.err
