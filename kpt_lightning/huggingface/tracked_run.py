"""A run that is being measured, and its end: as it should be, by an exception, or with the process."""

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kpt_lightning.optimize.plan import Plan
from kpt_lightning.tracking.conclusion import Conclusion
from kpt_lightning.tracking.drift import Drift
from kpt_lightning.tracking.judge import Judge, broken_off_record
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.recorder import RunInfo, RunRecorder, TokenCount, warn_of_drift

PlanSource = Callable[[], Plan | Mapping[str, Any] | None]

_open: "list[TrackedRun]" = []


class TrackedRun:
    """Measures from its making on, and is stored exactly once.

    Neither Accelerate nor the Hugging Face Trainer tells anybody of an exception. So a run that nobody ended is stored
    by :func:`break_off_runs`, which the launcher calls, else when the process ends; not where a signal kills it.

    Attributes:
        recorder: To be told of steps.
        facts: JSON-like; they go into the details of the record.
        record: None before the end, and where no step was measured.
        comparison: The record beside its history, None where there was none.
    """

    def __init__(
        self,
        model: nn.Module,
        info: RunInfo,
        judge: Judge,
        *,
        device: torch.device,
        plan: PlanSource | None = None,
        first_step: int = 1,
        warmup_steps: int = 10,
        tokens_per_batch: TokenCount | None = None,
        flops_per_step: float | None = None,
    ) -> None:
        """Start measuring; arguments as those of :class:`.recorder.RunRecorder`.

        Args:
            model: In training.
            info: What makes the run unlike others.
            judge: Of the run, at its end.
            device: Where the model trains.
            plan: Called at the end, when the first steps have added what they proved.
            first_step: Number of the first optimizer step; above 1 in a resumed run.
            warmup_steps: Optimizer steps that no metric counts.
            tokens_per_batch: Of this process.
            flops_per_step: Of this process.

        Raises:
            ConfigError: ``warmup_steps`` is negative, or the config is not JSON-like.
        """
        self.judge, self._plan, self._process = judge, plan, os.getpid()
        self.record: RunRecord | None = None
        self.comparison: Conclusion | None = None
        self.facts: dict[str, Any] = {}
        self._undo = ExitStack()
        self.recorder = RunRecorder(
            model, info, device=device, warmup_steps=warmup_steps, tokens_per_batch=tokens_per_batch,
            flops_per_step=flops_per_step, on_drift=self._tell,
        )  # fmt: skip
        self.recorder.start(first_step)
        _open.append(self)
        atexit.register(self._at_exit)

    def own(self, undo: Callable[[], None]) -> None:
        """Call this when the run ends, however it does."""
        self._undo.callback(undo)

    def finish(self) -> None:
        """Training is over and good: store, judge, print."""
        if self._close():
            self.recorder.stop()
            self.record = self._with_facts(self.recorder.finish("finished", plan_as_data(self._plan)))
            if self.record is not None:
                self.comparison = self.judge.finished(self.record)

    def break_off(self, error: BaseException | None, cause: str | None = None) -> None:
        """Training ended early; nothing is raised.

        Args:
            error: What ended it, None where nobody knows.
            cause: In words, where there is no error.
        """
        if self._close():
            self.record = self._with_facts(broken_off_record(self.recorder, error, cause))
            if self.record is not None:
                self.comparison = self.judge.broken_off(self.record)

    def _with_facts(self, record: RunRecord | None) -> RunRecord | None:
        return None if record is None else replace(record, details={**record.details, **self.facts})

    def _tell(self, drift: Drift) -> None:
        if self.judge.on_regression != "ignore":
            warn_of_drift(drift)

    def _close(self) -> bool:
        """Whether the run was open, in this process and not in one that it was forked from."""
        atexit.unregister(self._at_exit)
        if self not in _open:
            return False
        _open.remove(self)
        self._undo.close()
        return os.getpid() == self._process

    def _at_exit(self) -> None:
        # What the interpreter printed a traceback of, if it did.
        self.break_off(getattr(sys, "last_value", None), cause="the process ended before the training did")


def break_off_runs(error: BaseException) -> None:
    """Store every run of this process that is still open as ended by ``error``, where it passes by."""
    for run in tuple(_open):
        run.break_off(error)


def plan_as_data(source: PlanSource | None) -> Mapping[str, Any] | None:
    """The plan of now as JSON-like data."""
    plan = None if source is None else source()
    return plan.to_dict() if isinstance(plan, Plan) else plan


def precision_of(plan: Mapping[str, Any] | None, mixed_precision: str, model: nn.Module) -> str:
    """Precision for the key: that of the plan, else Accelerate's, else that of most weights.

    Args:
        plan: As data.
        mixed_precision: Accelerate's: no, bf16, fp16 or fp8.
        model: Its weights decide between 32 and bf16.
    """
    if plan is not None and "precision" in plan:
        return str(plan["precision"])
    if mixed_precision != "no":
        return {"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(mixed_precision, mixed_precision)
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    most = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    return {torch.bfloat16: "bf16", torch.float16: "16"}.get(most, "32")


def parallel_of(distributed_type: str) -> str:
    """Name of the way of distributing for the key, from Accelerate's own."""
    if distributed_type.startswith("MULTI_"):
        return "ddp"
    return {"NO": "single", "FSDP": "fsdp2"}.get(distributed_type, distributed_type.lower())
