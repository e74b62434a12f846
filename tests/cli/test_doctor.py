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


TARGETS = """
import torch
from torch import nn
from torch.nn import functional as F

def sound():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (torch.ones(6, 4), torch.ones(6, 2)), F.mse_loss

def other():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))

def broken():
    model, batch, loss_fn = sound()
    model[1].bias.data[0] = float("nan")
    return {"model": model, "batch": batch, "loss_fn": loss_fn}

def weights():
    return sound()[0]
"""


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    path = tmp_path / "targets.py"
    path.write_text(TARGETS)
    return path


def test_a_sound_model_gives_a_table_without_fault_and_status_0(targets: Path) -> None:
    done = kpt("doctor", "--model", f"{targets}:sound", "--reference", f"{targets}:weights")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "0 faults in 16 checks" in lines
    assert max(len(line) for line in lines) <= 80
    assert column(lines, "Findings: model", "Verdict").count("ok") == 16


@pytest.mark.parametrize(
    ("arguments", "faults"),
    [
        (["broken"], {"finite weights", "loss", "finite gradients"}),
        (["sound", "--reference", "other"], {"parity"}),
        (["weights"], set()),
    ],
    ids=["NaN", "another model", "weights alone"],
)
def test_faults_are_named_and_give_status_1(targets: Path, arguments: list[str], faults: set[str]) -> None:
    named = [each if each.startswith("--") else f"{targets}:{each}" for each in arguments]
    done = kpt("doctor", "--json", "--model", *named)
    assert (done.returncode, done.stderr) == (1 if faults else 0, "")
    found = json.loads(done.stdout)["model"]
    assert {each["subject"] for each in found["findings"] if not each["accepted"]} == faults
    assert found["ok"] is not bool(faults)


def test_settings_that_a_machine_cannot_meet_are_faults(tmp_path: Path) -> None:
    path = tmp_path / "kpt.yaml"
    path.write_text("precision: fp8\nlevel: aggressive\n")
    fits = kpt("doctor", "--config", str(path), "--profile", str(PROFILES / "h100.json"))
    lacks = kpt("doctor", "--config", str(path), "--profile", str(PROFILES / "a100.json"))
    assert (fits.returncode, lacks.returncode) == (0, 1)
    assert "0 faults in 2 checks" in fits.stdout
    assert "no FP8 unit" in column(lacks.stdout.splitlines(), "Findings: config", "Reason")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "no.such.module:f"], "kpt: target='no.such.module:f': there is no module 'no'."),
        (["--reference", "a.py:f"], "kpt: --reference='a.py:f': is compared with a model."),
        (["--config", "absent.yaml"], "kpt: config='absent.yaml': cannot be read"),
    ],
    ids=["no module", "reference alone", "no config"],
)
def test_a_wrong_argument_is_one_line_on_stderr_and_status_2(arguments: list[str], said: str) -> None:
    done = kpt("doctor", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(said)


def test_the_version_is_the_packages() -> None:
    assert kpt("--version").stdout == f"kpt-lightning {__version__}\n"


def test_help_names_the_command_and_loads_no_torch() -> None:
    assert "doctor" in kpt("--help").stdout
    code = "import sys, kpt_lightning.cli.main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
