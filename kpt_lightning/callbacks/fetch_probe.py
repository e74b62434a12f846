"""Times the data loader of a fit: no callback hook surrounds it, the profiler's actions do."""

import lightning.pytorch as pl

from kpt_lightning.measure.timer import StepTimer

FETCH_ACTION = "train_dataloader_next"
"""End of the action that Lightning profiles around ``next(loader)``, see lightning/pytorch/loops/training_epoch_loop.py
of 2.6."""


class FetchProbe:
    """Listens to the trainer's profiler, of whatever class, until it is removed."""

    def __init__(self, trainer: "pl.Trainer", timer: StepTimer) -> None:
        """Listen from now on; every action still reaches the profiler."""
        self._profiler = profiler = trainer.profiler  # type: ignore[attr-defined]
        start, stop = profiler.start, profiler.stop

        def start_and_tell(action_name: str) -> None:
            start(action_name)
            if action_name.endswith(FETCH_ACTION):
                timer.fetch_start()

        def stop_and_tell(action_name: str) -> None:
            if action_name.endswith(FETCH_ACTION):
                timer.fetch_end()
            stop(action_name)

        vars(profiler).update(start=start_and_tell, stop=stop_and_tell)

    def remove(self) -> None:
        """Give the profiler its own methods back."""
        for name in ("start", "stop"):
            vars(self._profiler).pop(name, None)
