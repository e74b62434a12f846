"""A file that is foreign, torn, read-only or on a full disk: one kind of error, and nothing lost."""

import os
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kpt_lightning.errors import ConfigError, HistoryError
from kpt_lightning.tracking.store import RunStore
from tests.tracking.test_schema import IDS, VERSION_1, rows, state
from tests.tracking.test_store import make


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copy(VERSION_1, tmp_path / "runs.sqlite"))


@pytest.mark.parametrize("size", [1, 99, 5_000])
def test_random_bytes_are_refused_and_left_alone(tmp_path: Path, size: int) -> None:
    path = tmp_path / "runs.sqlite"
    path.write_bytes(random.Random(size).randbytes(size))
    before = path.read_bytes()
    with pytest.raises(HistoryError, match="cannot be read or written"):
        RunStore(path).add(make("1"))
    assert path.read_bytes() == before


def test_the_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "browser.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(HistoryError, match="something else, with the tables bookmarks"):
        RunStore(path).open()
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [16, 100, 4_096, 9_000, 16_384, 24_000])
def test_a_file_that_was_cut_off_is_refused(old: Path, kept: int) -> None:
    torn = old.read_bytes()[:kept]
    old.write_bytes(torn)
    with pytest.raises(HistoryError):
        RunStore(old).all()


def test_a_row_that_lost_a_part_is_refused_with_the_next_step(old: Path) -> None:
    connection = sqlite3.connect(old)
    connection.execute("UPDATE kpt_runs SET record = substr(record, 1, 40) WHERE run_id = 'old-3'")
    connection.commit()
    connection.close()
    with pytest.raises(HistoryError, match=r"a row of it is damaged.*doctor"):
        RunStore(old).all()


@pytest.fixture
def immutable(old: Path) -> Iterator[Callable[[Path], None]]:
    """Makes a file or directory read-only even for root."""
    locked: list[Path] = []

    def lock(path: Path) -> None:
        done = subprocess.run(["chattr", "+i", str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs chattr +i, as root ignores modes: {done.stderr.strip()}")
        locked.append(path)

    yield lock
    for path in locked:
        subprocess.run(["chattr", "-i", str(path)], check=True)


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_history_that_may_not_be_written_is_refused_and_not_lost(
    old: Path, immutable: Callable[[Path], None], what: str
) -> None:
    before = old.read_bytes()
    immutable(old if what == "file" else old.parent)
    with pytest.raises(HistoryError, match="Check that the path"):
        RunStore(old).add(make("new"))
    assert old.read_bytes() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a small tmpfs, which takes root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_refuses_the_next_run_and_keeps_all_before_it(small_disk: Path) -> None:
    store = RunStore(small_disk / "runs.sqlite")
    stored = []

    def fill() -> None:
        for number in range(1_000):
            store.add(make(f"run-{number}"))
            stored.append(f"run-{number}")

    with pytest.raises(HistoryError, match=r"full|disk"):
        fill()
    assert stored
    kept = shutil.copytree(small_disk, small_disk.parent / "kept")
    assert [record.run_id for record in RunStore(kept / "runs.sqlite").all()] == stored
    assert state(kept / "runs.sqlite")[2] == "ok"


def test_an_old_history_on_a_full_disk_stays_of_version_1(small_disk: Path) -> None:
    path = Path(shutil.copy(VERSION_1, small_disk / "runs.sqlite"))
    with pytest.raises(OSError, match="space"):
        (small_disk / "rest").write_bytes(bytes(2**20))
    with pytest.raises(HistoryError):
        RunStore(path).open()
    kept = Path(shutil.copy(path, small_disk.parent / "kept.sqlite"))
    assert state(kept) == ([1], {"kpt_schema", "kpt_runs"}, "ok")
    assert [row[1] for row in rows(kept)] == IDS


@pytest.mark.parametrize(
    ("prefix", "found"), [("a", "a"), ("ab", "abc"), ("abd", "abd"), ("b", None), ("", None), ("x", None), ("b1", "b1")]
)
def test_a_run_is_found_by_the_beginning_of_its_id(tmp_path: Path, prefix: str, found: str | None) -> None:
    store = RunStore(tmp_path / "runs.sqlite")
    for run_id in ("a", "abc", "b1", "b2"):
        store.add(make(run_id))
    if prefix == "abd":
        store.add(make("abd"))
    if found is None:
        with pytest.raises(ConfigError, match=r"begins? so"):
            store.find(prefix)
    else:
        assert store.find(prefix).run_id == found
