"""``kpt doctor`` and the program around it, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kpt_lightning import __version__, optional
from kpt_lightning.hardware import detect, features

PROFILES = Path(__file__).parents[1] / "hardware" / "profiles"


def kpt(*arguments: str, columns: int = 80) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "kpt_lightning.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def column(lines: list[str], title: str, heading: str) -> str:
    """The text of one column of one printed table, its wrapped lines joined."""
    start = next(index for index, line in enumerate(lines) if line.strip() == title)
    body = lines[start + 2 :]
    end = next((index for index, line in enumerate(body) if index > 2 and not line.strip()), len(body))
    offset = body[0].index(heading)
    return " ".join(line[offset:].strip() for line in body[2:end])


@pytest.mark.parametrize("name", ["mixed_a100_h100", "h100_mig", "cpu_only", "b200"])
def test_at_80_columns_no_line_is_longer_and_no_reason_is_cut(name: str) -> None:
    path = str(PROFILES / f"{name}.json")
    tables, data = kpt("doctor", "--profile", path), kpt("doctor", "--profile", path, "--json")
    assert (tables.returncode, data.returncode) == (0, 0)
    lines = tables.stdout.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert "…" not in tables.stdout
    reasons = [feature["reason"] for feature in json.loads(data.stdout)["features"]]
    assert column(lines, "Features", "Reason") == " ".join(reasons)


def test_json_is_the_only_thing_on_stdout_and_holds_this_machine() -> None:
    done = kpt("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    assert data["kpt_lightning"] == __version__
    assert data["profile"]["versions"]["torch"] == torch.__version__
    assert data["profile"]["host"]["cores"] == detect().host.cores
    assert [feature["subject"] for feature in data["features"]] == list(features.NAMES)
    assert [package["subject"] for package in data["optional"]] == [package.module for package in optional.ALL]


def test_each_missing_package_has_its_pip_line_whole() -> None:
    text = kpt("doctor").stdout
    for package in optional.ALL:
        assert package.distribution in text
        assert package.available() or f"{package.pip_line}\n" in "\n".join(line.strip() for line in text.splitlines())


def test_an_error_of_ours_is_one_line_on_stderr_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"schema": 99}')
    done = kpt("doctor", "--profile", str(tmp_path / "old.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kpt: schema=99: ")
    assert done.stderr.count("\n") == 1


def test_the_version_is_the_packages() -> None:
    assert kpt("--version").stdout == f"kpt-lightning {__version__}\n"


def test_help_names_the_command_and_loads_no_torch() -> None:
    assert "doctor" in kpt("--help").stdout
    code = "import sys, kpt_lightning.cli.main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
