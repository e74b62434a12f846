"""``kpt optimize``, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kpt_lightning.cli.main import app
from kpt_lightning.errors import ConfigError
from kpt_lightning.optimize.plan import Plan

TARGETS = """
import torch
from torch import nn
from torch.nn import functional as F

def whole():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    batch = torch.randn(8, 16), torch.randn(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return {"model": model, "batch": batch, "loss_fn": F.mse_loss, "optimizer": optimizer}

def model_alone():
    return nn.Linear(2, 2)

def no_loss():
    return nn.Linear(2, 2), torch.ones(3, 2)
"""


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    path = tmp_path / "targets.py"
    path.write_text(TARGETS)
    return path


def kpt(directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kpt_lightning.cli.main", "optimize", *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_plan_is_printed_and_written_and_the_second_run_takes_it_up_without_a_trial(targets: Path) -> None:
    arguments = ("targets.py:whole", "--level", "conservative")
    first = kpt(targets.parent, *arguments, "--json", "--out", "plan.json")
    assert first.returncode == 0, first.stderr
    data = json.loads(first.stdout)
    assert data == json.loads((targets.parent / "plan.json").read_text())
    plan = Plan.from_dict(data)
    assert plan.to_dict() == data
    assert plan.trials
    second = kpt(targets.parent, *arguments)
    assert second.returncode == 0, second.stderr
    assert "kpt: plan taken from .kpt/plans/" in second.stderr
    assert second.stdout.startswith("Plan by trial, kept from an earlier run: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{}:model_alone"], "gives no batch to measure on"),
        (["{}:whole", "--config", "absent.yaml"], "cannot be read"),
        (["{}:nosuch"], "there is no 'nosuch' in it"),
        (["{}:whole", "--max-seconds", "0"], "must be above 0"),
        (["{}:whole", "--level", "extreme"], "level='extreme': is not allowed"),
        (["{}:whole", "--out", "no/such/plan.json"], "lies in a directory that is not there"),
        (["{}:whole", "--out", "."], "is a directory"),
    ],
    ids=["no batch", "config", "no function", "no time", "level", "no directory", "directory"],
)
def test_a_wrong_argument_is_told_before_anything_runs(targets: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        app(["optimize", *(each.format(targets) for each in arguments)], standalone_mode=False)


def test_a_model_that_gives_no_loss_is_one_line_on_stderr_and_status_2(targets: Path) -> None:
    done = kpt(targets.parent, "targets.py:no_loss", "--fresh")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "what the model returned is a tensor of shape (3, 2), no scalar loss" in done.stderr
