"""What is said during a run and after it: a line with progress and time left, and a table."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from kpt_lightning.measure.memory import peak_memory, reset_peak
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.recipes.config import FineTuneConfig
from kpt_lightning.recipes.training import check_losses

LOOK_EVERY = 10
"""Steps between two looks at the loss, each of which waits for the device."""


def to_terminal(said: object) -> None:
    """Print a line, whose brackets are no markup, or a table."""
    is_line = isinstance(said, str)
    Console(highlight=False).print(said, markup=not is_line, soft_wrap=is_line)


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneResult:
    """What a run did.

    Attributes:
        config: Its settings.
        driver: What trained: "lightning" or "accelerate".
        before: Held-out figures of the model as it came; "loss" is in nats for each token or sample.
        after: The same after training.
        losses: Training loss of each forward pass, in order.
        unit: What ``count`` counts: "tokens" or "samples".
        count: Trained on, of all processes.
        seconds: Of training alone, the first step with its compilation included.
        peak_bytes: Most memory in use on the main process, None where the device does not tell.
        peak_source: What was read, and since when.
        plan: What kpt changed and proved; None without it, and beside a launcher, which tells that itself.
        model: The trained module, unwrapped.
    """

    config: FineTuneConfig
    driver: str
    before: dict[str, float]
    after: dict[str, float]
    losses: list[float]
    unit: str
    count: int
    seconds: float
    peak_bytes: int | None
    peak_source: str
    plan: Plan | None
    model: nn.Module

    @property
    def loss_before(self) -> float:
        """Held-out loss of the model as it came."""
        return self.before["loss"]

    @property
    def loss_after(self) -> float:
        """Held-out loss after training."""
        return self.after["loss"]

    def table(self) -> Table:
        """The run for a terminal."""
        table = Table(title=escape(f"{self.config.recipe}, {self.config.model}, {self.driver}"), title_justify="left")
        for column in ("", "before", "after"):
            table.add_column(column, overflow="fold")
        for name in sorted(self.before, key=lambda name: (name != "loss", name)):
            table.add_row(f"held-out {name}", f"{self.before[name]:.4f}", f"{self.after[name]:.4f}")
        speed = self.count / self.seconds
        said = f"{self.count:,} {self.unit} in {self.seconds:.1f} s: {speed:,.0f} {self.unit}/s"
        table.add_row("trained on", "", said)
        if self.peak_bytes is not None:
            table.add_row("peak memory", "", f"{self.peak_bytes / 2**30:.2f} GiB ({self.peak_source})")
        if self.plan is not None:
            table.add_row("kpt", "", escape(self.plan.summary()))
            for proof in self.plan.proofs:
                table.add_row("proved" if proof else "not proved", "", escape(f"{proof.subject}: {proof.reason}"))
        return table


@dataclass(slots=True)
class Meter(AbstractContextManager["Meter"]):
    """Counts and times training, shows how far it is, and stops it where the loss is no number.

    Attributes:
        steps: Optimizer steps of the run.
        device: That trains.
        unit: What is counted.
        show: Whether this process writes to the terminal.
        losses: Of each forward pass, scalars on the device.
    """

    steps: int
    device: torch.device
    unit: str
    show: bool
    losses: list[Tensor] = field(default_factory=list)
    count: int = 0
    seconds: float = 0.0
    _done: int = 0
    _looked: int = 0
    _start: float = 0.0
    _progress: Progress | None = None
    _task: TaskID | None = None

    def __enter__(self) -> "Meter":
        """Start the clock and the line."""
        reset_peak(self.device)
        if self.show:
            columns = [TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}")]
            left = [TextColumn("left"), TimeRemainingColumn()]
            self._progress = Progress(*columns, *left, console=Console(stderr=True))
            self._progress.start()
            self._task = self._progress.add_task("", total=self.steps, said="")
        self._start = perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the clock once the device is done; an error leaves what was counted."""
        if kind is None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = perf_counter() - self._start
        if self._progress is not None:
            self._progress.stop()

    def forward(self, loss: Tensor, count: int) -> None:
        """One forward pass is done.

        Args:
            loss: A scalar.
            count: Tokens or samples of the batch, of all processes.
        """
        self.losses.append(loss.detach())
        self.count += count

    def step(self) -> None:
        """One optimizer step is done.

        Raises:
            KptError: A loss since the last look is NaN or infinite.
        """
        self._done += 1
        if self._done % LOOK_EVERY and self._done not in (1, self.steps):
            return
        check_losses(self.losses[self._looked :], self._done)
        self._looked = len(self.losses)
        if self._progress is not None and self._task is not None:
            speed = self.count / (perf_counter() - self._start)
            said = f"loss {float(self.losses[-1]):.4f}  {speed:,.0f} {self.unit}/s"
            self._progress.update(self._task, completed=self._done, said=said)

    def result(self, **known: Any) -> FineTuneResult:
        """The result of the run, with what the driver knows."""
        peak = peak_memory(self.device)
        return FineTuneResult(
            losses=[float(loss) for loss in self.losses], unit=self.unit, count=self.count, seconds=self.seconds,
            peak_bytes=None if peak is None else peak.peak_bytes, peak_source="" if peak is None else peak.source,
            **known,
        )  # fmt: skip
