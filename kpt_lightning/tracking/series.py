"""What the steps of a run leave behind, in bounded memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kpt_lightning.measure.timer import StepTimes

CAPACITY = 1 << 16
LOSS_WINDOW = 64
LOSS_TAIL = 20
WARMUP_SHARE = 3


@dataclass(slots=True)
class Work:
    """Work in one optimizer step, of this process.

    Attributes:
        index: Number of the step since the start of the fit, from 1.
        batches: Batches accumulated.
        tokens: Tokens of all batches, None where they hold none.
        samples: Samples of all batches.
        token_positions: Sum over batches of tokens times sequence length, for the attention.
        shape: Shape of the tensor that was counted in the last batch.
    """

    index: int
    batches: int = 0
    tokens: int | None = None
    samples: int = 0
    token_positions: int = 0
    shape: tuple[int, ...] | None = None


@dataclass(slots=True)
class StepSeries:
    """Times of all steps: the warm-up apart, the rest thinned by halves once there are :data:`CAPACITY` of them."""

    warmup: int
    seen: int = 0
    _warm: list[StepTimes] = field(default_factory=list)
    _steady: list[StepTimes] = field(default_factory=list)
    _stride: int = 1

    def add(self, steps: Sequence[StepTimes]) -> None:
        """Append finished steps."""
        for step in steps:
            if self.seen < self.warmup:
                self._warm.append(step)
            elif (self.seen - self.warmup) % self._stride == 0:
                self._steady.append(step)
            self.seen += 1
            if len(self._steady) >= CAPACITY:
                del self._steady[1::2]
                self._stride *= 2

    @property
    def first(self) -> StepTimes | None:
        """The first step of all."""
        return next(iter(self._warm or self._steady), None)

    def steady(self) -> tuple[list[StepTimes], int]:
        """Steps after the warm-up, and its length: at most a third of the run, and 1 of a run of two."""
        used = min(self.warmup, max(self.seen // WARMUP_SHARE, int(self.seen > 1)))
        return self._warm[used:] + self._steady, used


def is_mark(step: int) -> bool:
    """Whether the loss of this step is kept: 1, 2, 5, 10, 20, 50, ... so that runs of unlike length share some."""
    while step >= 10 and step % 10 == 0:
        step //= 10
    return step in (1, 2, 5)


def is_judged_mark(step: int) -> bool:
    """Whether the loss of this step is a metric: 10, 100, 1,000, ... Judging more would raise more false alarms."""
    while step >= 100 and step % 10 == 0:
        step //= 10
    return step == 10


class LossTrace:
    """Losses on their device: nothing is fetched before :meth:`finish`, and nothing waits for the device."""

    def __init__(self) -> None:
        """Start with no loss."""
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._marks: dict[int, list[torch.Tensor]] = {}
        self._tail: torch.Tensor | None = None
        self._finite: torch.Tensor | None = None

    def add(self, step: int, loss: torch.Tensor | float) -> None:
        """Keep the loss of one batch; ``step`` is the optimizer step that it belongs to, from 1."""
        value = loss.detach().clone() if isinstance(loss, torch.Tensor) else torch.tensor(float(loss))
        if value.numel() != 1:
            return
        self._pending.append((step, value))
        if len(self._pending) >= LOSS_WINDOW:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        window = torch.stack([value.reshape(()).float() for _, value in self._pending])
        finite = torch.isfinite(window).all()
        self._finite = finite if self._finite is None else torch.logical_and(self._finite, finite)
        self._tail = window if self._tail is None else torch.cat([self._tail, window])[-LOSS_WINDOW:]
        for step, value in self._pending:
            if is_mark(step):
                self._marks.setdefault(step, []).append(value)
        self._pending.clear()

    def finish(self) -> tuple[list[float], dict[int, float], bool | None]:
        """Fetch the last :data:`LOSS_TAIL` losses, the finite ones at marked steps, and whether all were finite."""
        self._flush()
        if self._tail is None or self._finite is None:
            return [], {}, None
        means = {
            step: float(torch.stack([v.reshape(()).float() for v in vs]).mean()) for step, vs in self._marks.items()
        }
        marks = {step: mean for step, mean in means.items() if math.isfinite(mean)}
        return self._tail[-LOSS_TAIL:].tolist(), marks, bool(self._finite)
