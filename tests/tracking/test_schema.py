"""A history of version 1 is brought up to date whole or not at all, whoever opens it and whatever kills it."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking.acks import all_acks
from kpt_lightning.tracking.baselines import new_baseline, pin, pinned
from kpt_lightning.tracking.schema import SCHEMA_VERSION
from kpt_lightning.tracking.store import RunStore
from tests.tracking.test_store import make

VERSION_1 = Path(__file__).parent / "data" / "history_v1.sqlite"
"""Six runs of one key, one that failed and one of another key, written by kpt-lightning of schema version 1."""

IDS = [*(f"old-{number}" for number in range(6)), "old-failed", "old-fp8"]

OPEN = """
import sys
import psycopg
from kpt_lightning.tracking.store import RunStore
print("ready", flush=True)
sys.stdin.readline()
print(len(RunStore(sys.argv[1]).open().all()), flush=True)
"""

KILLED = """
import os, signal, sys
import sqlalchemy as sa
from kpt_lightning.tracking.store import RunStore
place, statement = sys.argv[1:]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
@sa.event.listens_for(sa.Engine, "before_cursor_execute")
def before(connection, cursor, text, *_):
    if statement != "COMMIT" and text.lstrip().startswith(statement):
        die()
if statement == "COMMIT":
    sa.event.listen(sa.Engine, "commit", die)
RunStore(place).open()
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copy(VERSION_1, tmp_path / "runs.sqlite"))


def rows(path: Path) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT * FROM kpt_runs ORDER BY sequence").fetchall()
    finally:
        connection.close()


def state(path: Path) -> tuple[list[int], set[str], str]:
    connection = sqlite3.connect(path)
    try:
        versions = [version for (version,) in connection.execute("SELECT version FROM kpt_schema")]
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return versions, tables, connection.execute("PRAGMA integrity_check").fetchone()[0]
    finally:
        connection.close()


def test_a_file_of_version_1_keeps_every_row_as_it_was_and_takes_baselines(old: Path) -> None:
    before = rows(old)
    store = RunStore(old)
    records = store.all()
    assert [record.run_id for record in records] == IDS
    assert records[0].metrics["step_time"].median == 0.1
    assert rows(old) == before
    assert state(old) == ([SCHEMA_VERSION], {"kpt_schema", "kpt_runs", "kpt_baselines", "kpt_acks"}, "ok")
    pin(store, [new_baseline("main", records[:6])])
    assert pinned(RunStore(old), "main")[records[0].key.digest].run_ids == tuple(IDS[:6])
    store.add(make("new"))
    assert store.ids() == {*IDS, "new"}


def open_at_once(place: "Path | str", count: int) -> list[str]:
    """What that many processes print that open it in the same moment."""
    command = [sys.executable, "-c", OPEN, str(place)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    opened = [subprocess.Popen(command, **pipes) for _ in range(count)]
    for process in opened:
        assert process.stdout.readline() == "ready\n"
    for process in opened:
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate()[0] for process in opened]


@pytest.mark.parametrize("statement", ["CREATE TABLE kpt_acks", "UPDATE kpt_schema", "COMMIT"])
def test_killed_in_the_middle_the_file_is_still_of_version_1_and_the_next_one_succeeds(
    old: Path, statement: str
) -> None:
    before = rows(old)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(old), statement], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert state(old) == ([1], {"kpt_schema", "kpt_runs"}, "ok")
    assert [record.run_id for record in RunStore(old).all()] == IDS
    assert rows(old) == before


def test_processes_that_open_an_old_file_at_once_all_succeed(old: Path) -> None:
    assert open_at_once(old, 3) == [f"{len(IDS)}\n"] * 3
    assert state(old)[0] == [SCHEMA_VERSION]


@pytest.fixture
def old_server(postgres: str) -> str:
    """A database as version 1 made it, with the rows of the file."""
    name = f"t{uuid.uuid4().hex}"
    engine = sa.create_engine(postgres.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    url = postgres.replace("/postgres?", f"/{name}?")
    engine = sa.create_engine(RunStore(url).url)
    with engine.begin() as connection:
        for statement in (
            "CREATE TABLE kpt_schema (version SERIAL NOT NULL, PRIMARY KEY (version))",
            "CREATE TABLE kpt_runs (sequence SERIAL NOT NULL, run_id VARCHAR(64) NOT NULL, created_at VARCHAR(40) NOT "
            "NULL, key_digest VARCHAR(64) NOT NULL, status VARCHAR(16) NOT NULL, record TEXT NOT NULL, PRIMARY KEY "
            "(sequence), UNIQUE (run_id))",
            "CREATE INDEX ix_kpt_runs_key_digest ON kpt_runs (key_digest)",
            "INSERT INTO kpt_schema VALUES (1)",
        ):
            connection.execute(sa.text(statement))
        insert = "INSERT INTO kpt_runs (run_id, created_at, key_digest, status, record) VALUES (:a, :b, :c, :d, :e)"
        for row in rows(VERSION_1):
            connection.execute(sa.text(insert), dict(zip("abcde", row[1:], strict=True)))
    engine.dispose()
    return url


def test_a_server_of_version_1_is_brought_up_to_date_by_several_at_once(old_server: str) -> None:
    assert open_at_once(old_server, 4) == [f"{len(IDS)}\n"] * 4
    store = RunStore(old_server)
    assert [record.run_id for record in store.all()] == IDS
    pin(store, [new_baseline("main", store.all()[:6])])
    assert len(pinned(store, "main")) == 1
    assert all_acks(store) == []


def test_killed_in_the_middle_a_server_is_still_of_version_1(old_server: str) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, old_server, "UPDATE kpt_schema"], check=False)
    assert killed.returncode == -signal.SIGKILL
    engine = sa.create_engine(RunStore(old_server).url)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version FROM kpt_schema")).scalars().all() == [1]
        assert set(sa.inspect(connection).get_table_names()) == {"kpt_schema", "kpt_runs"}
    engine.dispose()
    assert [record.run_id for record in RunStore(old_server).all()] == IDS


def test_a_newer_version_is_refused_and_not_a_byte_is_changed(old: Path) -> None:
    connection = sqlite3.connect(old)
    connection.execute(f"UPDATE kpt_schema SET version = {SCHEMA_VERSION + 1}")
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    before = old.read_bytes()
    with pytest.raises(HistoryError, match=f"version {SCHEMA_VERSION + 1}.*Upgrade kpt-lightning"):
        RunStore(old).open()
    assert old.read_bytes() == before


def test_a_history_without_its_version_is_refused(old: Path) -> None:
    connection = sqlite3.connect(old)
    connection.execute("DELETE FROM kpt_schema")
    connection.commit()
    connection.close()
    with pytest.raises(HistoryError, match="holds no schema version"):
        RunStore(old).all()
