"""Measures a training run. Knows no trainer, so that any loop can use it."""

import json
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch
from torch import nn

from kpt_lightning.errors import ConfigError
from kpt_lightning.measure.batch import batch_size
from kpt_lightning.measure.memory import PeakMemory, peak_memory, reset_peak
from kpt_lightning.measure.timer import StepTimer, StepTimes
from kpt_lightning.tracking.compilation import Compilation, CompilationWatch
from kpt_lightning.tracking.device_readings import DeviceReadings
from kpt_lightning.tracking.drift import Drift, DriftDetector, DriftWarning
from kpt_lightning.tracking.fingerprint import environment, model_fingerprint
from kpt_lightning.tracking.record import RunKey, RunRecord, digest
from kpt_lightning.tracking.series import LossTrace, StepSeries, Work
from kpt_lightning.tracking.summary import Observed, common_shape, most_batches, summarize

T = TypeVar("T")
TokenCount = int | Callable[[Any], int]

OUT_OF_MEMORY = "out of memory"
"""``details["cause"]`` of a run that died of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What the recorder cannot see for itself; each goes into the key.

    Attributes:
        name: Label of the run.
        precision: Precision string, such as "bf16-mixed".
        strategy: Name of the way of distributing.
        device_count: Processes that train together.
        config: Anything JSON-like that makes runs unlike.
        plan: The optimization plan as JSON-like data; stored, not in the key.
        resumed_from: Run whose checkpoint this one continues; stored, not in the key.
    """

    name: str
    precision: str = "32-true"
    strategy: str = "single"
    device_count: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    resumed_from: str | None = None


def warn_of_drift(drift: Drift) -> None:
    """Warn on the spot."""
    warnings.warn(f"kpt: {drift.text}", DriftWarning, stacklevel=2)


class RunRecorder:
    """Collects times, work, memory and losses of one run.

    A loop calls :meth:`start`, then per batch :meth:`batch_start` and :meth:`batch_end`, around anything that is not
    training :meth:`pause`, and at last :meth:`finish`. Wrapping the loader in :meth:`batches` measures its cost.
    Something that grows while training, see :mod:`.drift`, is told at once.
    """

    def __init__(
        self,
        model: nn.Module,
        info: RunInfo,
        *,
        device: torch.device | str = "cpu",
        warmup_steps: int = 10,
        tokens_per_batch: TokenCount | None = None,
        flops_per_step: float | None = None,
        on_drift: Callable[[Drift], None] = warn_of_drift,
    ) -> None:
        """Prepare; the device is touched by :meth:`start`.

        Args:
            model: Read for its fingerprint at the start and its FLOPs at the end.
            info: See :class:`RunInfo`.
            device: Where the model trains.
            warmup_steps: Optimizer steps that no metric counts; at most a third of the run.
            tokens_per_batch: Tokens in a batch of this process, or a function of the batch; None looks for token ids.
            flops_per_step: FLOPs of one optimizer step of this process; None counts them by formula.
            on_drift: Called with each drift, once for each kind.

        Raises:
            ConfigError: ``warmup_steps`` is negative, or the config or plan is not JSON-like.
        """
        if warmup_steps < 0:
            raise ConfigError("warmup_steps", warmup_steps, "must be at least 0", "Give 0 to count every step")
        self.run_id = uuid.uuid4().hex
        _check_json("config", info.config)
        _check_json("plan", info.plan)
        self.model, self.info, self.device = model, info, torch.device(device)
        self.timer = StepTimer(self.device)
        self._series = StepSeries(warmup_steps)
        self._losses = LossTrace()
        self._tokens_per_batch, self._flops_per_step = tokens_per_batch, flops_per_step
        self._work = Work(index=1)
        self._memory: PeakMemory | None = None
        self._compilation: Compilation | None = None
        self._on_drift = on_drift
        self._stalls: list[float] = []

    @property
    def steps(self) -> int:
        """Optimizer steps that ended since the start."""
        return self._work.index - 1

    def start(self, first_step: int = 1) -> None:
        """The model is on its device and training is about to start.

        Args:
            first_step: Number of the first optimizer step; above 1 in a resumed run.
        """
        from kpt_lightning.hardware import detect

        self._first_step = first_step
        self._profile = detect()
        self._fingerprint = model_fingerprint(self.model)
        driver = self._profile.versions.get("driver")
        self._environment = environment({"driver": driver} if driver else None)
        self._drift = DriftDetector(DeviceReadings(self.device), first_step)
        self._compiling = CompilationWatch()
        reset_peak(self.device)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Iterate a loader and time it."""
        iterator = iter(loader)
        while True:
            self.timer.fetch_start()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.timer.fetch_end()
            yield batch

    def batch_start(self, batch: Any) -> None:
        """Just before the forward pass."""
        self._add_work(batch)
        self.timer.batch_start()

    def batch_end(self, loss: torch.Tensor | float | None = None, *, done: bool = True) -> None:
        """Just after the backward pass, or after the optimizer's step where it made one.

        Args:
            loss: Kept on its device.
            done: Whether this batch ended an optimizer step; False while gradients accumulate.
        """
        self.timer.batch_end(step_done=done, context=self._work if done else None)
        if loss is not None:
            self._losses.add(self._first_step - 1 + self._work.index, loss)
        if done:
            self._take(self.timer.drain())
            self._work = Work(index=self._work.index + 1)

    def loss(self, step: int, value: torch.Tensor | float) -> None:
        """A loss that became known after its step, as a mean over several; ``step`` counts from the first run's first.

        Args:
            step: The optimizer step that it belongs to, from 1.
            value: Kept on its device.
        """
        self._losses.add(step, value)

    def pause(self) -> None:
        """Validation, a checkpoint or the like happens before the next batch: its time is not the training's."""
        self.timer.pause()

    def checkpointed(self, seconds: float) -> None:
        """A checkpoint held the training up for so long."""
        self._stalls.append(seconds)

    def stop(self, *, wait: bool = True) -> None:
        """Training is over. ``wait=False`` takes only what is ready: after a failure a device may never answer."""
        # What grew in the last steps is no news any more.
        self._series.add(self.timer.finish() if wait else self.timer.drain())
        self._memory = peak_memory(self.device)
        self._compilation = self._compiling.read()

    def finish(
        self, status: str = "finished", plan: Mapping[str, Any] | None = None, cause: str | None = None
    ) -> RunRecord | None:
        """The record. A run that did not finish has no losses: none are fetched.

        Args:
            status: "finished", "failed" or "interrupted".
            plan: The plan with what was proved since the start; None keeps that of :class:`RunInfo`.
            cause: What ended a run that did not finish, such as "out of memory".

        Returns:
            None where no step was measured, unless memory ran out in the first one.
        """
        steady, warmup = self._series.steady()
        if not steady and not (cause == OUT_OF_MEMORY and self._work.batches):
            return None
        losses, marks, finite = self._losses.finish() if status == "finished" else ([], {}, None)
        observed = Observed(
            steady=steady, first=self._series.first, warmup=warmup, warmup_asked=self._series.warmup,
            memory=self._memory, losses=losses, finite=finite, clock=self.timer.clock, dropped=self.timer.dropped,
            model=self.model, precision=self.info.precision, profile=self._profile, flops_per_step=self._flops_per_step,
            marks=marks, compilation=self._compilation, stalls=self._stalls,
        )  # fmt: skip
        metrics, details, notes = summarize(observed)
        seen = steady or [StepTimes(0.0, 0.0, None, self._work)]
        config = {"batch": common_shape(seen), "batches_per_step": most_batches(seen), **self.info.config}
        return RunRecord(
            run_id=self.run_id,
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            key=RunKey(
                name=self.info.name,
                model=self._fingerprint,
                config=digest(config),
                device=self._profile.primary.name,
                device_count=self.info.device_count,
                strategy=self.info.strategy,
                precision=self.info.precision,
            ),
            status=status,
            metrics=metrics,
            environment=self._environment,
            loss_at=marks,
            loss_finite=finite,
            details={**details, **self._facts(), "config": config, **({"cause": cause} if cause else {})},
            notes=(*notes, *self._drift.notes(), *((f"{status}: {cause}",) if cause else ())),
            plan=self.info.plan if plan is None else plan,
        )

    def _take(self, steps: list[StepTimes]) -> None:
        self._series.add(steps)
        for step in steps:
            if step.context.index > self._series.warmup:
                for drift in self._drift.add(step):
                    self._on_drift(drift)

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "steps": self.steps, "first_step": self._first_step, "device_type": self.device.type
        }  # fmt: skip
        if self._drift.found:
            facts["drift"] = [drift.to_dict() for drift in self._drift.found]
        return facts if self.info.resumed_from is None else facts | {"resumed_from": self.info.resumed_from}

    def _add_work(self, batch: Any) -> None:
        work, size = self._work, batch_size(batch)
        tokens = None if size is None else size.tokens
        if self._tokens_per_batch is not None:
            given = self._tokens_per_batch
            tokens = given if isinstance(given, int) else int(given(batch))
        work.batches += 1
        if size is not None:
            work.samples += size.samples
            work.shape = size.shape
        if tokens is not None:
            work.tokens = (work.tokens or 0) + tokens
            work.token_positions += tokens * (size.shape[-1] if size is not None and size.tokens is not None else 0)


def _check_json(name: str, data: Mapping[str, Any] | None) -> None:
    """Raise now, not after the training, where the record could not be stored."""
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            name, data, f"must be JSON-like ({error})", "Give strings, numbers, lists and dicts"
        ) from error
