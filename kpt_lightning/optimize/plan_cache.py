"""Plans by trial kept between runs: the same model, sizes, machine and versions need no second trial."""

import contextlib
import json
import os
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from kpt_lightning.candidates.candidate import Candidate
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.errors import ConfigError
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optional import ALL, installed_version
from kpt_lightning.tracking.fingerprint import model_fingerprint
from kpt_lightning.tracking.record import digest

DIRECTORY = Path(".kpt/plans")
"""Under the current directory, beside the run history."""


def plan_key(subject: Subject, pool: tuple[Candidate, ...], precision: str) -> str:
    """What must be equal for a plan to be used again.

    Args:
        subject: Model, batch, settings and machine.
        pool: Candidates that were tried.
        precision: Of the trainer, or of the model in a plain loop.
    """
    model = subject.model
    structure = [(name, type(module).__qualname__, module.training) for name, module in model.named_modules()]
    optimizer = subject.optimizer
    facts = {
        "model": model_fingerprint(model),
        "structure": structure,
        "batch": _sizes(subject.batch),
        "config": subject.config.model_dump(mode="json"),
        "precision": precision,
        "goal": subject.goal,
        "optimizer": None if optimizer is None else type(optimizer).__qualname__,
        "machine": [(device.name, subject.profile.versions.get("driver")) for device in subject.profile.devices],
        "threads": torch.get_num_threads() if subject.device.type == "cpu" else None,
        "versions": {
            "kpt": installed_version("kpt-lightning"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "packages": {package.distribution: package.version for package in ALL},
        "candidates": sorted(each.name for each in pool),
    }
    return digest(facts)


def find_plan(directory: Path, key: str) -> Plan | None:
    """The plan kept under ``key``, None where there is none; one that cannot be read is a warning and tried anew."""
    path = directory / f"{key}.json"
    try:
        return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError) as error:
        warnings.warn(f"kpt: the kept plan {path} cannot be read and is made anew: {error}", stacklevel=2)
        return None


def keep_plan(directory: Path, key: str, plan: Plan) -> None:
    """Write a plan so that a reader sees all of it or nothing; a full or read-only disk is a warning."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=directory, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(plan.to_dict(), file, indent=1)
            os.replace(name, directory / f"{key}.json")
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(f"kpt: the plan cannot be kept in {directory}: {error.strerror}", stacklevel=2)


def _sizes(batch: Any) -> list[tuple[str, str]]:
    leaves, _ = tree_flatten_with_path(batch)
    return [
        (str(path), f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__)
        for path, leaf in leaves
    ]
