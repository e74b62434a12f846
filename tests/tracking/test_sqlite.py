"""A history that cannot be written is read without a lock, without a file beside it and without a change."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking.store import RunStore
from tests.tracking.test_schema import VERSION_1
from tests.tracking.test_store import make


@contextlib.contextmanager
def unwritable(*paths: Path) -> Iterator[None]:
    """Take the right to write, also from root."""
    locked: list[tuple[Path, int]] = []
    for path in paths:
        locked.append((path, path.stat().st_mode))
        path.chmod(path.stat().st_mode & 0o555)
        if os.access(path, os.W_OK):
            done = subprocess.run(["chattr", "+i", str(path)], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"needs chattr +i, as root ignores modes: {done.stderr.strip()}")
    try:
        yield
    finally:
        for path, mode in locked:
            if os.geteuid() == 0:
                subprocess.run(["chattr", "-i", str(path)], check=False)
            path.chmod(mode)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A history of three runs in a folder of its own."""
    path = tmp_path / "team" / "runs.sqlite"
    for each in "123":
        RunStore(path).add(make(each))
    return path


@pytest.mark.parametrize("what", ["file", "directory"])
def test_it_is_read_and_stays_as_it_is(place: Path, what: str) -> None:
    before = place.read_bytes()
    with unwritable(place if what == "file" else place.parent):
        store = RunStore(place, reading=True)
        assert store.read_only
        assert [run.run_id for run in store.all()] == ["1", "2", "3"]
        with pytest.raises(HistoryError, match="cannot be read or written"):
            store.add(make("4"))
    assert place.read_bytes() == before
    assert [path.name for path in place.parent.iterdir()] == ["runs.sqlite"]
    assert not RunStore(place, reading=True).read_only


def test_what_a_killed_process_left_in_the_log_is_read(tmp_path: Path) -> None:
    place = tmp_path / "team" / "runs.sqlite"
    code = (
        "import os, signal, sys\nfrom kpt_lightning.tracking.store import RunStore\n"
        "from tests.tracking.test_store import make\nstore = RunStore(sys.argv[1])\nstore.add(make('0'))\n"
        "with store.connect() as open_one:\n    pass\n"
        "held = store._engine.raw_connection()\nheld.execute('SELECT count(*) FROM kpt_runs').fetchall()\n"
        "RunStore(sys.argv[1]).add(make('1'))\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert place.with_name("runs.sqlite-wal").stat().st_size > 0
    with unwritable(place, place.parent):
        assert [run.run_id for run in RunStore(place, reading=True).all()] == ["0", "1"]


def test_an_older_one_says_that_it_must_be_opened_once_to_write(tmp_path: Path) -> None:
    place = Path(shutil.copy(VERSION_1, tmp_path / "runs.sqlite"))
    with unwritable(place), pytest.raises(HistoryError, match=r"version 1 and it cannot be written.*Open it once"):
        RunStore(place, reading=True).open()
    assert RunStore(place, reading=True).open().all()


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "runs.sqlite"
    place.write_bytes(b"no database, and long enough to be taken for one" * 100)
    with unwritable(place), pytest.raises(HistoryError, match="not a database"):
        RunStore(place, reading=True).open()


@pytest.mark.parametrize("content", [None, b""])
def test_nothing_is_there_before_a_run_was_written(tmp_path: Path, content: bytes | None) -> None:
    place = tmp_path / "runs.sqlite"
    if content is not None:
        place.write_bytes(content)
    assert not RunStore(place).exists()
    RunStore(place).add(make("1"))
    assert RunStore(place).exists()
