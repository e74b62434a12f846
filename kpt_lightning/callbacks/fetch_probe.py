"""Times the data loader and the checkpoints of a fit: no callback hook surrounds them, the profiler's actions do."""

import time
from collections.abc import Callable

import lightning.pytorch as pl

from kpt_lightning.measure.timer import StepTimer

FETCH_ACTION = "train_dataloader_next"
"""End of the action that Lightning profiles around ``next(loader)``, see lightning/pytorch/loops/training_epoch_loop.py
of 2.6."""

SAVE_ACTION = "save_checkpoint"
"""The action around Trainer.save_checkpoint, see lightning/pytorch/trainer/trainer.py of 2.6."""


class FetchProbe:
    """Listens to the trainer's profiler, of whatever class, until it is removed."""

    def __init__(
        self, trainer: "pl.Trainer", timer: StepTimer, saved: Callable[[float], None] | None = None
    ) -> None:  # fmt: skip
        """Listen from now on; every action still reaches the profiler.

        Args:
            trainer: Its profiler is listened to.
            timer: Told of each fetch.
            saved: Called with the seconds that each checkpoint held the training up.
        """
        self._profiler = profiler = trainer.profiler  # type: ignore[attr-defined]
        start, stop = profiler.start, profiler.stop
        save_started: list[float] = []

        def start_and_tell(action_name: str) -> None:
            start(action_name)
            if action_name.endswith(FETCH_ACTION):
                timer.fetch_start()
            elif action_name == SAVE_ACTION:
                save_started.append(time.perf_counter())

        def stop_and_tell(action_name: str) -> None:
            if action_name.endswith(FETCH_ACTION):
                timer.fetch_end()
            elif action_name == SAVE_ACTION and save_started and saved is not None:
                saved(time.perf_counter() - save_started.pop())
            stop(action_name)

        vars(profiler).update(start=start_and_tell, stop=stop_and_tell)

    def remove(self) -> None:
        """Give the profiler its own methods back."""
        for name in ("start", "stop"):
            vars(self._profiler).pop(name, None)
