"""``kpt_state.json``: what of this library was at work when a checkpoint was written."""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optional import ACCELERATE, TRANSFORMERS, installed_version

FILE_NAME = "kpt_state.json"


class _Session(Protocol):
    config: KptConfig
    plans: list[Plan]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """Told beside the weights, which have the names and dtypes of the unconverted model.

    Attributes:
        models: Class of each model.
        plans: ``Plan.to_dict`` of each converted model.
        config: The settings that were set.
        versions: Distribution to version.
    """

    models: list[str]
    plans: list[dict[str, Any]]
    config: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of(cls, session: _Session, models: Iterable[torch.nn.Module]) -> "SavedState":
        """What is at work now.

        Args:
            session: Has the settings and the plans.
            models: Unwrapped.
        """
        names = ("kpt-lightning", "torch", ACCELERATE.distribution, TRANSFORMERS.distribution)
        return cls(
            models=[type(model).__name__ for model in models],
            plans=[plan.to_dict() for plan in session.plans],
            config=session.config.model_dump(mode="json", exclude_unset=True),
            versions={name: version for name in names if (version := installed_version(name)) is not None},
        )

    def write(self, folder: Path) -> None:
        """Write the file into a folder that is there."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        (folder / FILE_NAME).write_text(json.dumps(fields, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "SavedState | None":
        """The file's content, None where there is none.

        Raises:
            ConfigError: It is no JSON, or has not this form.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            state = cls(**{name: fields[name] for name in cls.__slots__})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                FILE_NAME, str(path), f"does not have the form of this version ({error!r})",
                "Delete it: the weights do not need it",
            ) from error  # fmt: skip
        return state

    def differences(self, now: "SavedState") -> list[str]:
        """What is not as it was, each with both values."""
        found = _unequal("model", ", ".join(self.models), ", ".join(now.models))
        found += _unequal("plan", _plans(self.plans), _plans(now.plans))
        for name in self.versions.keys() | now.versions.keys():
            found += _unequal(name, self.versions.get(name, "absent"), now.versions.get(name, "absent"))
        return found


def tell_differences(folder: Path, now: SavedState) -> None:
    """Warn where a checkpoint was written under another model, plan or version. Nothing is changed."""
    try:
        then = SavedState.read(folder)
    except ConfigError as error:
        warnings.warn(f"kpt: {error}", stacklevel=2)
        return
    if then is not None and (found := then.differences(now)):
        warnings.warn(f"kpt: {folder} is loaded as it is, and was written with {'; '.join(found)}", stacklevel=2)


def _unequal(name: str, then: str, now: str) -> list[str]:
    return [] if then == now else [f"{name} {then or 'none'} (now {now or 'none'})"]


def _plans(plans: Iterable[Mapping[str, Any]]) -> str:
    """What each plan does to its model, in few words."""
    return ", ".join(
        "; ".join([str(plan.get("precision")), *(_change(change) for change in plan.get("changes", ()))])
        for plan in plans
    )


def _change(change: Mapping[str, Any]) -> str:
    setting = change.get("setting", {})
    count = sum(len(value) for value in setting.values() if isinstance(value, list | tuple))
    detail = ", ".join(str(value) for value in setting.values() if isinstance(value, str))
    return f"{change.get('candidate')} ({', '.join(filter(None, (detail, str(count) if count else '')))})"
