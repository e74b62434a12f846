"""``kpt regress``, run as a build runs it: by its exit status."""

import json
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


def add(history: str, *values: float) -> None:
    for record in runs(list(values), start=len(RunStore(history).all())):
        RunStore(history).add(record)


def test_a_slower_run_fails_the_build_from_the_severity_on_that_is_asked_for(history: str) -> None:
    add(history, 0.1105)
    done = kpt("check", "--store", history)
    assert (done.returncode, done.stderr) == (1, "")
    assert "moderate regression" in done.stdout
    assert "+10." in done.stdout
    assert kpt("check", "--store", history, "--fail-on", "severe").returncode == 0
    data = json.loads(kpt("check", "--store", history, "--json").stdout)
    assert [(each["outcome"], each["severity"], each["metric"]) for each in data] == [
        ("regression", "moderate", "step_time")
    ]


def test_a_run_as_before_and_a_faster_one_pass(history: str) -> None:
    add(history, 0.1)
    assert kpt("check", "--store", history).returncode == 0
    add(history, 0.05)
    done = kpt("check", "--store", history)
    assert done.returncode == 0
    assert "improvement" in done.stdout


def test_too_little_to_compare_with_is_a_status_of_its_own(tmp_path: Path) -> None:
    place = str(tmp_path / "runs.sqlite")
    done = kpt("check", "--store", place)
    assert (done.returncode, done.stdout.strip()) == (3, "no finished run in this history")
    add(place, 0.1, 0.1)
    done = kpt("check", "--store", place)
    assert done.returncode == 3
    assert "at least" in done.stdout


def test_a_history_that_cannot_be_read_and_wrong_usage_have_their_own(tmp_path: Path) -> None:
    (tmp_path / "runs.sqlite").write_bytes(b"no database, and long enough to be taken for one" * 100)
    done = kpt("check", "--store", str(tmp_path / "runs.sqlite"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert kpt("check", "--store", str(tmp_path / "x.sqlite"), "--new", "0").returncode == 2
    assert kpt("check", "--fail-on", "tiny").returncode == 2


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
