"""Plans by trial kept between runs: the same model, sizes, machine and versions need no second trial."""

import contextlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from kpt_lightning.candidates.candidate import Candidate
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.errors import ConfigError
from kpt_lightning.optimize.code_facts import code_facts
from kpt_lightning.optimize.model_facts import model_facts
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.replay import load_plan
from kpt_lightning.optional import (
    ALL,
    DATASETS,
    GGUF,
    MINILM,
    PSYCOPG,
    SCATTERTEXT,
    SCIKIT_LEARN,
    SMOLLM2,
    installed_version,
)
from kpt_lightning.tracking.fingerprint import model_fingerprint
from kpt_lightning.tracking.record import digest

DIRECTORY = Path(".kpt/plans")
"""Under the current directory, beside the run history."""

NO_MATTER = (DATASETS, GGUF, MINILM, PSYCOPG, SCATTERTEXT, SCIKIT_LEARN, SMOLLM2)
"""Packages that give data or keep histories: another version of them makes no other plan."""


def plan_key(
    subject: Subject, pool: tuple[Candidate, ...], precision: str, functions: Sequence[Callable[..., Any]] = ()
) -> str:
    """What must be equal for a plan to be used again.

    Args:
        subject: Model, batch, settings and machine.
        pool: Candidates that were tried.
        precision: Of the trainer, or of the model in a plain loop.
        functions: That training calls beside the model, such as the loss function: their code counts.
    """
    facts = {
        "model": model_key(subject.model),
        "functions": [code_facts(nn.Identity(), each) for each in functions],
        "losses": [model_facts(each) for each in functions if isinstance(each, nn.Module)],
        "batch": _sizes(subject.batch),
        "config": subject.config.model_dump(mode="json"),
        "precision": precision,
        "goal": subject.goal,
        "optimizer": _optimizer(subject),
        "loader": _loader(subject.loader),
        "machine": [(device.name, subject.profile.versions.get("driver")) for device in subject.profile.devices],
        "threads": torch.get_num_threads() if subject.device.type == "cpu" else None,
        "flags": (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        "versions": {
            "kpt": installed_version("kpt-lightning"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "packages": {package.distribution: package.version for package in ALL if package not in NO_MATTER},
        "candidates": sorted(each.name for each in pool),
    }
    return digest(facts)


def model_key(model: nn.Module) -> str:
    """Equal for models of the same weights' shapes, settings and code."""
    return digest({"model": model_fingerprint(model), "structure": model_facts(model), "code": code_facts(model)})


def find_plan(directory: Path, key: str) -> Plan | None:
    """The plan kept under ``key``, None where there is none; one that cannot be read is a warning and tried anew."""
    path = directory / f"{key}.json"
    try:
        return load_plan(path)
    except ConfigError as error:
        if not path.exists():
            return None
        warnings.warn(f"kpt: the kept plan {path} cannot be read and is made anew: {error}", stacklevel=2)
        return None


def keep_plan(directory: Path, key: str, plan: Plan) -> None:
    """Write a plan so that a reader sees all of it or nothing; what cannot be written is a warning."""
    try:
        text = json.dumps(plan.to_dict(), indent=1)
        directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=directory, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, directory / f"{key}.json")
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except (OSError, TypeError, ValueError) as error:
        # A setting that is no JSON is the fault of a candidate from elsewhere; the plan itself is good.
        warnings.warn(f"kpt: the plan cannot be kept in {directory}: {error}", stacklevel=2)


def _optimizer(subject: Subject) -> Any:
    optimizer = subject.optimizer
    if optimizer is None:
        return None
    kinds = [[group.get(name) for name in ("fused", "foreach", "capturable")] for group in optimizer.param_groups]
    return type(optimizer).__qualname__, kinds


def _loader(loader: Any) -> Any:
    names = ("batch_size", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
    return None if loader is None else [type(loader).__qualname__, *(str(getattr(loader, name, "")) for name in names)]


def _sizes(batch: Any) -> list[tuple[str, str]]:
    leaves, _ = tree_flatten_with_path(batch)
    return [
        (str(path), f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__)
        for path, leaf in leaves
    ]
