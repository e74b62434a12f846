import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking.record import Metric, RunKey, RunRecord
from kpt_lightning.tracking.store import DEFAULT_PATH, SCHEMA_VERSION, RunStore

KEY = RunKey(
    name="m", model="a", config="b", device="cpu", device_count=1, strategy="single", precision="32-true"
)  # fmt: skip

WRITER = """
import dataclasses, sys
from tests_writer import make
from kpt_lightning.tracking.store import RunStore
path, label, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = RunStore(path)
for index in range(count):
    store.add(make(f"{label}-{index}"))
    print(f"{label}-{index}", flush=True)
"""

MAKE = """
from kpt_lightning.tracking.record import Metric, RunKey, RunRecord
def make(run_id):
    key = RunKey(name="m", model="a", config="b", device="cpu", device_count=1, strategy="single", precision="32-true")
    metric = Metric(median=0.1, unit="s", better="lower", n=10, n_effective=10.0, mad=0.001)
    return RunRecord(run_id=run_id, created_at="2026-01-01T00:00:00+00:00", key=key, status="finished",
                     metrics={"step_time": metric}, environment={"torch": "2"}, details={"pad": run_id * 200})
"""


def make(run_id, *, status="finished", key=KEY):
    metric = Metric(median=0.1, unit="s", better="lower", n=10, n_effective=10.0, mad=0.001)
    return RunRecord(
        run_id=run_id, created_at="2026-01-01T00:00:00+00:00", key=key, status=status,
        metrics={"step_time": metric}, environment={"torch": "2"}, loss_at={1: 0.5}, loss_finite=True, notes=("n",),
        plan={"precision": "fp8"},
    )  # fmt: skip


@pytest.fixture
def start_writer(tmp_path):
    (tmp_path / "tests_writer.py").write_text(MAKE)
    (tmp_path / "writer.py").write_text(WRITER)
    started = []

    def start(label, count):
        command = [sys.executable, str(tmp_path / "writer.py"), str(tmp_path / "runs.sqlite"), label, str(count)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_is_added_comes_back_equal_in_order(tmp_path):
    store = RunStore(tmp_path / "deep" / "runs.sqlite")
    records = [make(str(index)) for index in range(5)]
    for record in records:
        store.add(record)
    assert store.all() == records
    assert RunStore(tmp_path / "deep" / "runs.sqlite").get("3") == records[3]


def test_like_gives_the_newest_finished_runs_of_one_key_oldest_first(tmp_path):
    store = RunStore(tmp_path / "runs.sqlite")
    other = RunKey(**{name: getattr(KEY, name) for name in KEY.__slots__} | {"precision": "fp8"})
    for record in (make("1"), make("2", key=other), make("3", status="failed"), make("4"), make("5")):
        store.add(record)
    assert [run.run_id for run in store.like(KEY)] == ["1", "4", "5"]
    assert [run.run_id for run in store.like(KEY, limit=2)] == ["4", "5"]
    assert [run.run_id for run in store.like(KEY, status="failed")] == ["3"]
    assert store.like(KEY, limit=0) == []


@pytest.mark.parametrize("attempt", range(6))
def test_kill_9_in_the_middle_of_writing_loses_no_committed_run(tmp_path, start_writer, attempt):
    process = start_writer("w", 100_000)
    assert process.stdout.readline() == "w-0\n"
    time.sleep(random.Random(attempt).uniform(0.0, 0.5))
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().split()
    assert process.wait() == -signal.SIGKILL
    announced = 1 + len([line for line in rest if line.startswith("w-")])
    with sqlite3.connect(tmp_path / "runs.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    found = RunStore(tmp_path / "runs.sqlite").all()
    assert [run.run_id for run in found] == [f"w-{index}" for index in range(len(found))]
    assert announced - 1 <= len(found) <= announced + 1  # the last announced line may be cut, the last row unannounced
    assert all(run.details["pad"] == run.run_id * 200 for run in found)
    RunStore(tmp_path / "runs.sqlite").add(make("after"))


def test_two_processes_that_write_at_once_lose_nothing(tmp_path, start_writer):
    processes = [start_writer(label, 40) for label in "ab"]
    for process in processes:
        process.stdout.read()
        assert process.wait() == 0
    found = [run.run_id for run in RunStore(tmp_path / "runs.sqlite").all()]
    for label in "ab":
        assert [run for run in found if run.startswith(label)] == [f"{label}-{index}" for index in range(40)]


def test_a_file_that_is_no_database_is_refused_with_path_and_next_step(tmp_path):
    path = tmp_path / "runs.sqlite"
    path.write_bytes(b"this is not a database, but long enough to have a header" * 40)
    with pytest.raises(HistoryError, match=r"runs\.sqlite.*KPT_HISTORY"):
        RunStore(path).open()
    assert path.read_bytes().startswith(b"this is not")


def test_a_directory_and_a_place_below_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "runs.sqlite"):
        with pytest.raises(HistoryError, match="cannot be read or written"):
            RunStore(place).open()


def test_a_missing_database_driver_is_refused():
    with pytest.raises(HistoryError, match="cannot be read or written"):
        RunStore("postgresql+psycopg2://user:secret@localhost:1/x").open()


def test_a_password_never_shows():
    assert "secret" not in RunStore("postgresql://user:secret@host/x").place


def test_a_newer_schema_is_refused_and_left_alone(tmp_path):
    store = RunStore(tmp_path / "runs.sqlite").open()
    connection = sqlite3.connect(tmp_path / "runs.sqlite")
    connection.execute(f"UPDATE kpt_schema SET version = {SCHEMA_VERSION + 1}")
    connection.commit()
    connection.close()
    for call in (store.open, store.all, lambda: store.add(make("x"))):
        with pytest.raises(HistoryError, match="Upgrade kpt-lightning"):
            call()


def test_the_same_run_twice_is_refused(tmp_path):
    store = RunStore(tmp_path / "runs.sqlite")
    store.add(make("1"))
    with pytest.raises(HistoryError):
        store.add(make("1"))
    assert len(store.all()) == 1


def test_an_unknown_run_is_refused(tmp_path):
    with pytest.raises(HistoryError, match="not in"):
        RunStore(tmp_path / "runs.sqlite").get("nope")


def test_a_record_of_another_form_is_refused_by_name(tmp_path):
    store = RunStore(tmp_path / "runs.sqlite")
    store.add(make("1"))
    connection = sqlite3.connect(tmp_path / "runs.sqlite")
    connection.execute("UPDATE kpt_runs SET record = ?", (json.dumps({"run_id": "1"}),))
    connection.commit()
    connection.close()
    with pytest.raises(HistoryError, match="run='1'"):
        store.all()


def test_the_place_comes_from_the_argument_then_the_environment_then_the_default(tmp_path, monkeypatch):
    monkeypatch.delenv("KPT_HISTORY", raising=False)
    assert RunStore().place == str(DEFAULT_PATH)
    monkeypatch.setenv("KPT_HISTORY", str(tmp_path / "env.sqlite"))
    assert RunStore().place == str(tmp_path / "env.sqlite")
    assert RunStore(tmp_path / "arg.sqlite").place == str(tmp_path / "arg.sqlite")
    assert RunStore(f"sqlite:///{tmp_path}/url.sqlite").place == str(tmp_path / "url.sqlite")


def test_sqlite_is_in_wal_mode(tmp_path):
    RunStore(tmp_path / "runs.sqlite").open()
    connection = sqlite3.connect(tmp_path / "runs.sqlite")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
