"""Candidates that change nothing: how many of them a search takes for an optimization."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from results_table import environment
from torch import nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig, Level
from kpt_lightning.decision import Rejected
from kpt_lightning.hardware import detect
from kpt_lightning.optimize.rules import on_device
from kpt_lightning.optimize.search import search
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.workload import Workload


@dataclass(slots=True)
class NoOp:
    """Proposes a change that is none."""

    name: str
    level: Level = Level.CONSERVATIVE
    stage: Stage = Stage.MODULES
    turn: int = 40
    numerics: Numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ()
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        return [Change(candidate=self.name, reason="changes nothing")]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> None:
        return None

    def undo(self, subject: Subject, applied: None) -> None:
        return None


def measure(count: int, width: int, device: torch.device) -> dict[str, Any]:
    """Try ``count`` no-ops on a small MLP.

    Args:
        count: How many.
        width: Of its layers.
        device: Where it runs.

    Returns:
        JSON-like data; "passed" are the no-ops that won their own trial, "kept" those of them in the final plan.
    """
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    model.to(device)
    batch = torch.randn(64, width, device=device), torch.randint(0, 10, (64,), device=device)
    subject = Subject(
        model=model, profile=on_device(detect(), device.type), config=KptConfig(), device=device, batch=batch
    )
    pool = [NoOp(f"no_op_{number:03d}") for number in range(count)]
    work = Workload(model, batch, nn.CrossEntropyLoss())
    outcome = search(subject, work, max_seconds=math.inf, pool=pool, say=lambda text: print(text, flush=True))
    # Where all together are not faster, the search takes back what it kept, and says so behind the first reason.
    passed = [trial.candidate for trial in outcome.trials if trial.kept or trial.reason.startswith("faster, but")]
    return {
        "title": f"MLP of three layers, {width} wide, 64 rows, {device.type}", "count": count, "passed": passed,
        "kept": [change.candidate for change in outcome.changes], "step_ms": (subject.step_seconds or 0.0) * 1e3,
        "trials": [trial.to_dict() for trial in outcome.trials], "seconds": outcome.seconds, "load_before": load,
        "whole": None if outcome.whole is None else outcome.whole.to_dict(), "environment": environment(),
    }  # fmt: skip
