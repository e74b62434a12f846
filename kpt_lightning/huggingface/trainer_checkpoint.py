"""Checkpoints of the Hugging Face Trainer, whole or not at all.

The Trainer writes ``checkpoint-N`` file by file and takes the highest N to resume, also one that a killed process left.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpt_lightning.huggingface.atomic_folder import Place
from kpt_lightning.huggingface.joint_save import Ranks, save_jointly
from kpt_lightning.huggingface.saved_state import SavedState

if TYPE_CHECKING:
    from transformers import Trainer

    from kpt_lightning.huggingface.session import Session


def atomic_save_checkpoint(
    trainer: "Trainer", original: Callable[..., None], model: Any, trial: Any = None, *,
    session: "Session | None" = None,
) -> None:  # fmt: skip
    """Save as ``Trainer._save_checkpoint`` does; ``checkpoint-N`` appears, or is replaced, as a whole.

    Older checkpoints are deleted, and the new one is pushed to a hub, only after it is whole.

    Args:
        trainer: Whose state is saved.
        original: The Trainer's method, bound to ``trainer``.
        model: As the Trainer gives it.
        trial: Likewise.
        session: Told in ``kpt_state.json``; None writes no such file.

    Raises:
        KptError: Another process could not write its files; the folder is what it was.
    """
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

    run = Path(trainer._get_output_dir(trial=trial))
    target = run / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    pushes: list[str] = []

    def write(folder: Path) -> None:
        with _writing_to(trainer, folder.parent, pushes):
            original(model, trial)
        _name_best(trainer, run, target, folder)
        if session is not None and trainer.args.should_save:
            SavedState.of(session, [trainer.accelerator.unwrap_model(trainer.model)]).write(folder)

    save_jointly(Place.of(target), write, Ranks.of(trainer.accelerator))
    if pushes:
        trainer._push_from_checkpoint(str(target))
    if trainer.args.should_save:
        rotate_checkpoints(
            output_dir=str(run), save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint, use_mtime=True,
        )  # fmt: skip


@contextmanager
def _writing_to(trainer: "Trainer", folder: Path, pushes: list[str]) -> Iterator[None]:
    """The Trainer's checkpoints go below ``folder``, and what it would push is only noted."""
    own = {name: vars(trainer)[name] for name in ("_get_output_dir", "_push_from_checkpoint") if name in vars(trainer)}
    vars(trainer)["_get_output_dir"] = lambda trial: str(folder)
    vars(trainer)["_push_from_checkpoint"] = pushes.append
    try:
        yield
    finally:
        del vars(trainer)["_get_output_dir"], vars(trainer)["_push_from_checkpoint"]
        vars(trainer).update(own)


def _name_best(trainer: "Trainer", run: Path, target: Path, folder: Path) -> None:
    """The best checkpoint's path, which the Trainer looked for beside the unfinished one."""
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    state = trainer.state
    if not state.best_global_step or trainer.args.save_strategy == "no":
        return
    best = run / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if best == target or best.is_dir():
        state.best_model_checkpoint = str(best)
    if trainer.args.should_save:
        state.save_to_json(str(folder / TRAINER_STATE_NAME))
