"""KptTracker: a raw Accelerate loop in the history, ``Accelerator(log_with=KptTracker())``."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import GeneralTracker
from torch import nn

from kpt_lightning.huggingface.step_clock import StepClock
from kpt_lightning.huggingface.tracked_run import PlanSource, TrackedRun, parallel_of, plan_as_data, precision_of
from kpt_lightning.tracking.conclusion import Conclusion, RegressionError
from kpt_lightning.tracking.judge import Judge, Reaction
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.recorder import RunInfo, TokenCount
from kpt_lightning.tracking.severity import Severity
from kpt_lightning.tracking.store import RunStore

LOSS_NAMES = ("loss", "train_loss", "train/loss", "training_loss")
"""Names of logged values that are the training loss."""


class KptTracker(GeneralTracker):  # type: ignore[misc]
    """Measures each optimizer step between ``init_trackers`` and ``end_training``, stores the record and judges it.

    The first step is not measured, nobody tells when it began. With :meth:`follow` batches count too; without it the
    batch size is unknown and does not keep runs apart, and the model is known by the shapes of its Parameters.
    A loop that dies before ``end_training`` is stored as :class:`.tracked_run.TrackedRun` says.

    Attributes:
        record: Of the run, None before its end, on other processes, and where fewer than two steps ran.
        comparison: The record beside the finished runs of the same key, None where there was none.
    """

    name = "kpt"
    requires_logging_directory = False
    main_process_only = True

    def __init__(
        self,
        run_name: str | None = None,
        *,
        store: RunStore | str | Path | None = None,
        warmup_steps: int = 10,
        tokens_per_batch: TokenCount | None = None,
        flops_per_step: float | None = None,
        config: Mapping[str, Any] | None = None,
        plan: PlanSource | None = None,
        precision: str | None = None,
        on_regression: Reaction = "warn",
        fail_on: Severity = "minor",
        print_report: bool = True,
    ) -> None:
        """Configure; nothing is opened or measured before ``init_trackers``.

        Args:
            run_name: Label of the run, the model's class by default. Runs of different names are never compared.
            store: As of :class:`.judge.Judge`.
            warmup_steps: Optimizer steps that no metric counts; at most a third of the run.
            tokens_per_batch: Tokens in a batch of one process, or a function of the batch; None counts ``input_ids``.
            flops_per_step: FLOPs of one optimizer step of one process, for MFU; None counts them by formula.
            config: JSON-like settings that make runs unlike.
            plan: Gives the plan that the model trains with, or None.
            precision: For the key; None takes the plan's, else that of Accelerate and the weights.
            on_regression: "warn", "ignore", or "fail": a RegressionError from ``end_training`` on the main process.
            fail_on: Least severity that counts: "minor", "moderate" or "severe".
            print_report: Print one table at the end.

        Raises:
            ConfigError: ``on_regression`` or ``fail_on`` is not one of these.
        """
        super().__init__()
        self.judge = Judge(store, on_regression=on_regression, fail_on=fail_on, print_report=print_report)
        self.run_name, self.config, self.plan, self.precision = run_name, dict(config or {}), plan, precision
        self._measuring: dict[str, Any] = {
            "warmup_steps": warmup_steps, "tokens_per_batch": tokens_per_batch, "flops_per_step": flops_per_step
        }  # fmt: skip
        self._run: TrackedRun | None = None
        self._clock: StepClock | None = None
        self._model: nn.Module | None = None
        self._facts: dict[str, Any] = {}
        self._hears_saves = False

    @property
    def tracker(self) -> TrackedRun | None:
        """The run in progress, or the last one."""
        return self._run

    @property
    def record(self) -> RunRecord | None:
        """Of the run."""
        return None if self._run is None else self._run.record

    @property
    def comparison(self) -> Conclusion | None:
        """Of the run."""
        return None if self._run is None else self._run.comparison

    def start(self) -> None:
        """Called by ``init_trackers``: from now on optimizer steps are timed, on the main process.

        Raises:
            HistoryError: The history cannot be opened.
        """
        if PartialState().is_main_process and self._clock is None:
            self.judge.store.open()
            self._clock = StepClock(self._begin)

    def follow(self, accelerator: Accelerator) -> None:
        """Measure what this Accelerator has prepared: its first model, optimizer and loader.

        Iterating another of its loaders is evaluation, and that and ``save_state`` are not training time.
        Call it before the loop, and again when more was prepared.

        Args:
            accelerator: With this tracker.
        """
        if self._clock is None:
            return
        # What prepare returned, in its order; Accelerate 1.15 keeps it there and publishes no other way to it.
        models, optimizers, loaders = accelerator._models, accelerator._optimizers, accelerator._dataloaders
        if models:
            self._model = accelerator.unwrap_model(models[0])
        if optimizers:
            self._clock.optimizer = getattr(optimizers[0], "optimizer", optimizers[0])
        self._clock.watch(loaders)
        if not self._hears_saves:
            self._clock.own(accelerator.register_save_state_pre_hook(lambda *_: self.pause()).remove)
            self._hears_saves = True

    def pause(self) -> None:
        """What happens before the next batch, such as an evaluation, is not training time."""
        if self._run is not None:
            self._run.recorder.pause()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Hyperparameters: kept in ``details``, not in the key, for a seed or a folder makes no other kind of run."""
        self._facts["hyperparameters"] = {key: value for key, value in values.items() if _is_plain(value)}

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Losses by :data:`LOSS_NAMES` are kept for their optimizer step; of other values the last, in ``details``.

        ``step`` is not read: some scripts count batches.
        """
        if self._run is None:
            return
        for name, value in values.items():
            if name in LOSS_NAMES and isinstance(value, (float, int, torch.Tensor)):
                self._run.recorder.loss(self._run.recorder.steps + 1, value)
            elif _is_plain(value):
                self._facts.setdefault("logged", {})[name] = value

    def finish(self) -> None:
        """Called by ``end_training``: store, judge, print.

        Raises:
            RegressionError: The run is worse than its history and ``on_regression`` is "fail".
        """
        self._stop_clock()
        if self._run is None:
            return
        self._run.finish()
        found = self._run.comparison
        if found is not None and found.regressed and self.judge.on_regression == "fail":
            raise RegressionError("; ".join(found.regressions))

    def _begin(self, optimizer: torch.optim.Optimizer) -> TrackedRun:
        """After the first optimizer step, when everything is where it trains."""
        model = self._model or _ParametersOf(optimizer)
        state, plan = AcceleratorState(), plan_as_data(self.plan)
        info = RunInfo(
            name=self.run_name or (type(model).__name__ if self._model is not None else "accelerate"),
            precision=self.precision or precision_of(plan, state.mixed_precision, model),
            strategy=parallel_of(state.distributed_type.value),
            device_count=state.num_processes,
            config=self.config,
            plan=plan,
        )
        self._run = TrackedRun(
            model, info, self.judge, device=state.device, plan=self.plan, first_step=2, **self._measuring
        )
        self._run.facts = self._facts
        self._run.own(self._stop_clock)
        return self._run

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.stop()
            self._clock = None


def follow_trackers(accelerator: Accelerator) -> None:
    """Let the trackers of an Accelerator that are ours follow it; for a launcher, which calls it after each prepare."""
    for tracker in accelerator.trackers:
        if isinstance(tracker, KptTracker):
            tracker.follow(accelerator)


class _ParametersOf(nn.Module):
    """A model of which only what its optimizer trains is known."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.trained = nn.ParameterList(each for group in optimizer.param_groups for each in group["params"])


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))
