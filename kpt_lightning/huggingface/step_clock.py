"""Steps of a loop that nobody drives: seen by its optimizer and, where they are known, its loaders."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from kpt_lightning.huggingface.loader_watch import LoaderWatch
from kpt_lightning.huggingface.tracked_run import TrackedRun


class StepClock:
    """Tells a run of each step of one optimizer in this process, from the second on, until :meth:`stop`.

    With a loader a step is the time from when a batch was given to the optimizer's step, and the wait for batches is
    known; without one it is the time from step to step. A step of accumulated gradients is one step.
    """

    def __init__(self, begin: Callable[[torch.optim.Optimizer], TrackedRun]) -> None:
        """Listen to all optimizers of this process.

        Args:
            begin: Makes the run after the first step; it is given the optimizer.
        """
        self._begin = begin
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._has_loader = self._in_batch = False
        self._watched: dict[int, Any] = {}
        self._undo = ExitStack()
        self._run: TrackedRun | None = None
        self.own(register_optimizer_step_post_hook(self._stepped).remove)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The one whose steps count: the first that makes one, unless it is set."""
        return None if self._optimizer is None else self._optimizer()

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)

    def watch(self, loaders: Sequence[Any]) -> None:
        """See the batches of the first of these loaders; iterating another one is a pause. Known ones stay watched."""
        for place, loader in enumerate(loaders):
            if id(loader) in self._watched:
                continue
            self._watched[id(loader)] = loader
            watch = LoaderWatch(
                loader, asked=self._asked if place == 0 else self._paused, given=self._given if place == 0 else None
            )
            self._has_loader |= place == 0 and watch.watches
            self.own(watch.remove)

    def own(self, undo: Callable[[], None]) -> None:
        """Call this at :meth:`stop`."""
        self._undo.callback(undo)

    def stop(self) -> None:
        """Leave everything as it was."""
        self._undo.close()

    def _asked(self) -> None:
        if self._run is not None:
            self._end_batch(done=False)
            self._run.recorder.timer.fetch_start()

    def _given(self, batch: Any) -> None:
        if self._run is not None:
            self._run.recorder.timer.fetch_end()
            self._start_batch(batch)

    def _paused(self) -> None:
        if self._run is not None:
            self._run.recorder.pause()

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.optimizer is None:
            self.optimizer = optimizer
        if optimizer is not self.optimizer:
            return
        if self._run is None:
            self._run = self._begin(optimizer)
        else:
            self._end_batch(done=True)
        if not self._has_loader:
            self._start_batch(None)

    def _start_batch(self, batch: Any) -> None:
        assert self._run is not None
        self._run.recorder.batch_start(batch)
        self._in_batch = True

    def _end_batch(self, *, done: bool) -> None:
        if self._in_batch and self._run is not None:
            self._run.recorder.batch_end(done=done)
            self._in_batch = False
