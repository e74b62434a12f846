"""``kpt regress``, run as a build runs it: by its exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kpt_lightning.tracking.store import RunStore
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_foreign import DATA, PYTEST


def kpt(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}
    command = [sys.executable, "-m", "kpt_lightning.cli.main", "regress", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def history(tmp_path: Path) -> str:
    store = RunStore(tmp_path / "runs.sqlite")
    for record in runs(STEADY):
        store.add(record)
    return str(tmp_path / "runs.sqlite")


def test_what_is_exported_is_imported_once(history: str, tmp_path: Path) -> None:
    file, other = str(tmp_path / "runs.jsonl"), str(tmp_path / "other.sqlite")
    assert kpt("export", file, "--store", history).stdout == f"10 runs written to {file}\n"
    assert kpt("import", file, "--store", other).stdout == "10 runs added, 0 known already\n"
    assert kpt("import", file, "--store", other).stdout == "0 runs added, 10 known already\n"
    assert RunStore(other).all() == RunStore(history).all()
    assert kpt("import", str(tmp_path / "nothing"), "--store", other).returncode == 4


@pytest.mark.parametrize(("form", "place", "count"), [("pytest-benchmark", PYTEST, 3), ("asv", DATA / "asv", 4)])
def test_results_of_others_begin_a_history(tmp_path: Path, form: str, place: Path, count: int) -> None:
    store = str(tmp_path / "runs.sqlite")
    done = kpt("import", str(place), "--format", form, "--store", store)
    assert done.stdout == f"{count} runs added, 0 known already\n"
    assert kpt("check", "--store", store).returncode == 3
