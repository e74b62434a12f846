"""RegressionCallback: measures a fit, tells what drifts in it, keeps its record and judges it by its history."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from kpt_lightning.callbacks.fetch_probe import FetchProbe
from kpt_lightning.errors import ConfigError, HistoryError
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.tracking import report
from kpt_lightning.tracking.conclusion import Conclusion, RegressionError
from kpt_lightning.tracking.drift import Drift
from kpt_lightning.tracking.judge import Judge, Reaction, broken_off_record
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.recorder import RunInfo, RunRecorder, TokenCount, warn_of_drift
from kpt_lightning.tracking.severity import Severity
from kpt_lightning.tracking.store import RunStore


class RegressionCallback(Callback):
    """Measures every optimizer step of a fit, stores the record and says whether it is worse than those before it.

    Per step it adds a few clock reads (on CUDA: events) and no device synchronisation; losses stay on the device until
    the end. Validation, checkpoints and epoch ends are not training time. Rank 0 measures itself, writes and prints.
    A run that an exception or Ctrl-C ends is stored as "failed" or "interrupted", without losses, and never compared;
    ``fast_dev_run`` is not recorded. While training, a step time, a data wait or a memory that grows to stay is told
    once, as a DriftWarning and to the loggers as ``kpt/drift/<kind>``.

    Attributes:
        record: The record of the last fit, None on other ranks and where no step ran.
        comparison: The record beside the finished runs of the same key, None where there was none.
    """

    def __init__(
        self,
        store: RunStore | str | Path | None = None,
        *,
        warmup_steps: int = 10,
        name: str | None = None,
        tokens_per_batch: TokenCount | None = None,
        flops_per_step: float | None = None,
        config: Mapping[str, Any] | None = None,
        on_regression: Reaction = "warn",
        fail_on: Severity = "minor",
        print_report: bool = True,
    ) -> None:
        """Configure; nothing is opened or measured before the fit.

        Args:
            store: The history: a path, a database URL or a store. None is ``KPT_HISTORY``, else ``.kpt/runs.sqlite``
                under the current directory.
            warmup_steps: Optimizer steps that no metric counts; at most a third of the run, and the record says so.
            name: Label of the run, the module's class by default. Runs of different names are never compared.
            tokens_per_batch: Tokens in a batch of rank 0, or a function of the batch; None counts ``input_ids``.
            flops_per_step: FLOPs of one optimizer step of rank 0, for MFU; None counts them by formula.
            config: JSON-like settings that make runs unlike.
            on_regression: "warn", "ignore" (no warning of a drift either), "fail" (RegressionError on every rank after
                the fit), or a function of the :class:`.conclusion.Conclusion`, called on rank 0.
            fail_on: Least severity that counts: "minor", "moderate" or "severe".
            print_report: Print one table at the end.

        Raises:
            ConfigError: ``warmup_steps``, ``on_regression`` or ``fail_on`` is not one of these.
        """
        if warmup_steps < 0:
            raise ConfigError("warmup_steps", warmup_steps, "must be at least 0", "Give 0 to count every step")
        self.judge = Judge(store, on_regression=on_regression, fail_on=fail_on, print_report=print_report)
        self.warmup_steps, self.name, self.config = warmup_steps, name, dict(config or {})
        self.tokens_per_batch, self.flops_per_step = tokens_per_batch, flops_per_step
        self.record: RunRecord | None = None
        self.comparison: Conclusion | None = None
        self._recorder: RunRecorder | None = None
        self._probe: FetchProbe | None = None
        self._global_step = 0
        self._resumed_from: str | None = None
        self._verdict: tuple[str, ...] = ()

    @property
    @override
    def state_key(self) -> str:
        return "kpt_lightning.RegressionCallback"

    @override
    def state_dict(self) -> dict[str, Any]:
        running = self._recorder or self.record
        return {"version": 1, "run_id": None if running is None else running.run_id}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_from = state_dict.get("run_id")

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.record = self.comparison = self._recorder = None
        self._verdict = ()
        message = ""
        if trainer.is_global_zero:
            try:
                self.judge.store.open()
            except HistoryError as error:
                message = str(error)
        # Every rank must raise, or the others would wait for rank 0 in their next collective.
        if message := trainer.strategy.broadcast(message):
            raise HistoryError(message)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not trainer.is_global_zero or _is_rehearsal(trainer):
            return
        info = RunInfo(
            name=self.name or type(pl_module).__name__,
            precision=str(trainer.precision),
            strategy=type(trainer.strategy).__name__,
            device_count=trainer.world_size,
            config=self.config,
            plan=_plan(trainer),
            resumed_from=self._resumed_from,
        )
        self._recorder = RunRecorder(
            pl_module,
            info,
            device=trainer.strategy.root_device,
            warmup_steps=self.warmup_steps,
            tokens_per_batch=self.tokens_per_batch,
            flops_per_step=self.flops_per_step,
            on_drift=lambda drift: self._tell(trainer, drift),
        )
        self._recorder.start(first_step=trainer.global_step + 1)
        self._resumed_from = None
        self._probe = FetchProbe(trainer, self._recorder.timer, self._recorder.checkpointed)
        self._global_step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if self._recorder is not None:
            self._recorder.batch_start(batch)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder is None:
            return
        step = trainer.global_step
        done = step != self._global_step or not trainer.optimizers
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor) and pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
            loss = loss.detach() * trainer.accumulate_grad_batches  # Lightning divided it
        self._recorder.batch_end(loss if isinstance(loss, (torch.Tensor, float)) else None, done=done)
        self._global_step = step

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._pause()

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        self._pause()

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._pause()

    def _pause(self) -> None:
        if self._recorder is not None:
            self._recorder.pause()

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        recorder = self._take_recorder()
        if recorder is not None:
            recorder.stop()
            self.record = recorder.finish("finished", _plan(trainer))
        if self.record is not None:
            self._conclude(trainer, self.record)
        if self.judge.on_regression == "fail":
            self._verdict = trainer.strategy.broadcast(self._verdict)

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.is_global_zero and self.record is None and not _is_rehearsal(trainer):
            warnings.warn("kpt: no optimizer step ran, so there is no record of this fit.", stacklevel=2)
        if self._verdict:
            raise RegressionError("; ".join(self._verdict))

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        recorder = self._take_recorder()
        if recorder is None:
            return
        self.record = broken_off_record(recorder, exception)
        if self.record is not None:
            self.comparison = self.judge.broken_off(self.record)

    def _take_recorder(self) -> RunRecorder | None:
        recorder, self._recorder = self._recorder, None
        if self._probe is not None:
            self._probe.remove()
            self._probe = None
        return recorder

    def _conclude(self, trainer: "pl.Trainer", record: RunRecord) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(report.log_values(record), step=trainer.global_step)
        self.comparison = self.judge.finished(record)
        if self.comparison is not None and self.judge.on_regression == "fail":
            self._verdict = self.comparison.regressions

    def _tell(self, trainer: "pl.Trainer", drift: Drift) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"kpt/drift/{drift.kind}": drift.growth}, step=trainer.global_step)
        if self.judge.on_regression != "ignore":
            warn_of_drift(drift)


def _plan(trainer: "pl.Trainer") -> dict[str, Any] | None:
    """As it is now: the first steps add what they proved."""
    sources = (trainer.strategy, trainer.precision_plugin, *trainer.callbacks)  # type: ignore[attr-defined]
    plan: Plan | None = next(filter(None, (getattr(source, "plan", None) for source in sources)), None)
    return None if plan is None else plan.to_dict()


def _is_rehearsal(trainer: "pl.Trainer") -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
