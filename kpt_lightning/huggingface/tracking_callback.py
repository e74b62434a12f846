"""KptRunCallback: a run of the Hugging Face Trainer in the history, ``--report_to kpt``."""

import math
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kpt_lightning.errors import HistoryError
from kpt_lightning.huggingface.loader_watch import LoaderWatch
from kpt_lightning.huggingface.tracked_run import PlanSource, TrackedRun, parallel_of, plan_as_data, precision_of
from kpt_lightning.tracking.conclusion import Conclusion, RegressionError
from kpt_lightning.tracking.judge import Judge, Reaction
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.recorder import RunInfo, TokenCount
from kpt_lightning.tracking.severity import Severity
from kpt_lightning.tracking.store import RunStore


class KptRunCallback(TrainerCallback):  # type: ignore[misc]
    """Measures each optimizer step of ``Trainer.train``, stores the record and judges it by those before it.

    Evaluation, checkpoints and epoch ends are not training time. The main process measures itself, writes and prints.
    Losses are those that the Trainer logs, means over ``logging_steps``; nothing more waits for the device.
    ``Trainer`` reports no exception: see :class:`.tracked_run.TrackedRun` for runs that die.

    Attributes:
        record: Of the last training, None on other processes and where no step ran.
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
        plan: PlanSource | None = None,
        precision: str | None = None,
        on_regression: Reaction = "warn",
        fail_on: Severity = "minor",
        print_report: bool = True,
    ) -> None:
        """Configure; nothing is opened or measured before the training.

        Args:
            store: As of :class:`.judge.Judge`.
            warmup_steps: Optimizer steps that no metric counts; at most a third of the run.
            name: Label of the run, the model's class by default. Runs of different names are never compared.
            tokens_per_batch: Tokens in a batch of one process, or a function of the batch; None counts ``input_ids``.
            flops_per_step: FLOPs of one optimizer step of one process, for MFU; None counts them by formula.
            config: JSON-like settings that make runs unlike.
            plan: Gives the plan that the model trains with, or None.
            precision: For the key; None takes the plan's, else that of the arguments and the weights.
            on_regression: "warn", "ignore", or "fail": a RegressionError from ``train()`` on every process.
            fail_on: Least severity that counts: "minor", "moderate" or "severe".
            print_report: Print one table at the end.

        Raises:
            ConfigError: ``on_regression`` or ``fail_on`` is not one of these.
        """
        self.judge = Judge(store, on_regression=on_regression, fail_on=fail_on, print_report=print_report)
        self.name, self.config, self.plan, self.precision = name, dict(config or {}), plan, precision
        self._measuring: dict[str, Any] = {
            "warmup_steps": warmup_steps, "tokens_per_batch": tokens_per_batch, "flops_per_step": flops_per_step
        }  # fmt: skip
        self._run: TrackedRun | None = None
        self._batches: deque[Any] = deque()
        self._last_event = 0.0

    @property
    def record(self) -> RunRecord | None:
        """Of the last training."""
        return None if self._run is None else self._run.record

    @property
    def comparison(self) -> Conclusion | None:
        """Of the last training."""
        return None if self._run is None else self._run.comparison

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start measuring.

        Raises:
            HistoryError: The history cannot be opened; on every process, before the first step.
        """
        self._end_unfinished()
        message = ""
        if state.is_world_process_zero:
            try:
                self.judge.store.open()
            except HistoryError as error:
                message = str(error)
        # Every process must raise, or the others would wait for this one in their next collective.
        if message := self._agree(args, message):
            raise HistoryError(message)
        if state.is_world_process_zero:
            self._begin(args, state, kwargs["model"], kwargs.get("train_dataloader"))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loader starts anew: not training time."""
        self._batches.clear()
        self._pause()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All batches of the step have been fetched."""
        if self._run is not None:
            self._run.recorder.batch_start(self._next_batch())

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A batch of several in one step is over, and no hook tells when the next begins: now."""
        if self._run is not None:
            self._run.recorder.batch_end(done=False)
            self._run.recorder.batch_start(self._next_batch())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer made its step."""
        if self._run is not None:
            self._run.recorder.batch_end()
            self._last_event = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Keep the loss. The Trainer leaves a loss that is no number out of its mean; the gradients' norm tells."""
        if self._run is None or "loss" not in (logs or {}):
            return
        broken = math.isnan(logs.get("grad_norm") or 0.0)
        self._run.recorder.loss(state.global_step, math.nan if broken else logs["loss"])
        self._last_event = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Not training time."""
        self._pause()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Not training time."""
        self._pause()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint was written: not training time, and a metric of its own."""
        if self._run is not None:
            self._run.recorder.checkpointed(time.perf_counter() - self._last_event)
        self._pause()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Store, judge, print.

        Raises:
            RegressionError: The run is worse than its history and ``on_regression`` is "fail".
        """
        found: Conclusion | None = None
        if self._run is not None:
            self._run.finish()
            found = self._run.comparison
        if self.judge.on_regression == "fail":
            regressions = "; ".join(found.regressions) if found is not None else ""
            if regressions := self._agree(args, regressions):
                raise RegressionError(regressions)

    def _begin(self, args: TrainingArguments, state: TrainerState, model: Any, loader: Any) -> None:
        shared, plan = AcceleratorState(), plan_as_data(self.plan)
        info = RunInfo(
            name=self.name or type(model).__name__,
            precision=self.precision or precision_of(plan, shared.mixed_precision, model),
            strategy=parallel_of(shared.distributed_type.value),
            device_count=args.world_size,
            config=self.config,
            plan=plan,
        )
        self._run = TrackedRun(
            model, info, self.judge, device=args.device, plan=self.plan, first_step=state.global_step + 1,
            **self._measuring,
        )  # fmt: skip
        if loader is not None:
            timer = self._run.recorder.timer
            self._run.own(LoaderWatch(loader, asked=timer.fetch_start, given=self._given).remove)
        self._run.own(self._batches.clear)

    def _given(self, batch: Any) -> None:
        assert self._run is not None
        self._run.recorder.timer.fetch_end()
        self._batches.append(batch)

    def _next_batch(self) -> Any:
        """None where the loader is another than the one watched, as in the epoch that a resumed training begins in."""
        return self._batches.popleft() if self._batches else None

    def _pause(self) -> None:
        if self._run is not None:
            self._run.recorder.pause()
            self._last_event = time.perf_counter()

    def _end_unfinished(self) -> None:
        """A training that an exception ended, where the process went on to another one."""
        if self._run is not None:
            self._run.break_off(None, cause="another training began before this one ended")
            self._run = None

    @staticmethod
    def _agree(args: TrainingArguments, text: str) -> str:
        """What the main process says."""
        if args.world_size == 1:
            return text
        said = [text]
        broadcast_object_list(said)
        return said[0]
