"""``Accelerator.save_state`` whole or not at all, and ``load_state`` that tells what is not as it was."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpt_lightning.huggingface.atomic_folder import Place
from kpt_lightning.huggingface.joint_save import Ranks, save_jointly
from kpt_lightning.huggingface.saved_state import SavedState, tell_differences

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kpt_lightning.huggingface.session import Session

# Accelerate's own rule for the number of a checkpoint.
_NUMBER = re.compile(r"([0-9]+)(?=[^/]*$)")


def atomic_save_state(
    accelerator: "Accelerator", original: Callable[..., Any], output_dir: str | os.PathLike[str] | None = None, *,
    session: "Session | None" = None, **kwargs: Any,
) -> Path:  # fmt: skip
    """Save as ``Accelerator.save_state`` does; the folder appears, or is replaced, as a whole.

    Accelerate's naming and ``total_limit`` hold, and older checkpoints are deleted only after the new one is whole.

    Args:
        accelerator: Whose state is saved.
        original: Accelerate's method, bound to ``accelerator``.
        output_dir: As Accelerate takes it.
        session: Told in ``kpt_state.json``; None writes no such file.
        kwargs: Of ``Accelerator.save_state``.

    Returns:
        The folder, as Accelerate names it.

    Raises:
        ValueError: No folder was given, or one of the automatic name is there.
        FileExistsError: There is a file of that name.
        KptError: Another process could not write its files; the folder is what it was.
    """
    project = accelerator.project_configuration
    automatic = bool(project.automatic_checkpoint_naming)
    if not automatic and output_dir is None:
        raise ValueError("save_state needs output_dir where automatic_checkpoint_naming is off")
    named = _automatic_name(accelerator) if automatic else Path(os.fspath(output_dir or ""))
    # Accelerate takes everything in its folder of checkpoints for one.
    place = Place.of(named, beside=accelerator.project_dir if automatic else None)

    def write(folder: Path) -> None:
        project.automatic_checkpoint_naming = False
        try:
            original(str(folder), **kwargs)
        finally:
            project.automatic_checkpoint_naming = automatic
        if session is not None and accelerator.is_main_process:
            _state_now(accelerator, session).write(folder)

    save_jointly(place, write, Ranks.of(accelerator, together=automatic))
    if automatic and project.total_limit is not None and accelerator.is_main_process:
        _delete_oldest(named, place, project.total_limit)
    return named


def checked_load_state(
    accelerator: "Accelerator", original: Callable[..., Any], input_dir: str | os.PathLike[str] | None = None, *,
    session: "Session | None" = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """Load as ``Accelerator.load_state`` does, and warn where model, plan or versions are not those of the save.

    Args:
        accelerator: Whose state is loaded.
        original: Accelerate's method, bound to ``accelerator``.
        input_dir: As Accelerate takes it.
        session: What is at work now; None compares nothing.
        kwargs: Of ``Accelerator.load_state``.

    Returns:
        What Accelerate returns.
    """
    automatic = input_dir is None and accelerator.project_configuration.automatic_checkpoint_naming
    folder = _newest(accelerator) if automatic else None if input_dir is None else Path(input_dir).expanduser()
    if folder is not None:
        Place.of(folder, beside=accelerator.project_dir if automatic else None).recover()
        if session is not None and accelerator.is_main_process:
            tell_differences(folder, _state_now(accelerator, session))
    return original(input_dir, **kwargs)


def _state_now(accelerator: "Accelerator", session: "Session") -> SavedState:
    models = [accelerator.unwrap_model(model, keep_torch_compile=False) for model in accelerator._models]
    return SavedState.of(session, models)


def _automatic_name(accelerator: "Accelerator") -> Path:
    named = Path(accelerator.project_dir or "", "checkpoints", f"checkpoint_{accelerator.save_iteration}")
    if named.exists():
        raise ValueError(
            f"Checkpoint directory {named} ({accelerator.save_iteration}) already exists. Please manually override "
            "`self.save_iteration` with what iteration to start with."
        )
    return named


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    found = [(_NUMBER.search(str(each)), each) for each in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), each) for match, each in found if match is not None)


def _newest(accelerator: "Accelerator") -> Path | None:
    found = _numbered(Path(accelerator.project_dir or "", "checkpoints"))
    return found[-1][1] if found else None


def _delete_oldest(new: Path, place: Place, limit: int) -> None:
    others = [each for _, each in _numbered(new.parent) if each.name != new.name]
    for old in others[: max(0, len(others) + 1 - limit)]:
        Place.of(old, beside=place.beside).remove()
