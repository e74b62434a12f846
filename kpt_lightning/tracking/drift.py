"""Is this run getting slower, or bigger, while it trains? In memory that does not grow with the run.

Steps are summarised in blocks, as neighbouring ones are alike, and the row of blocks is tested after each: see
:mod:`.blocks` and :mod:`.growth`. What a step costs here is one append; a block of 32 costs some ten microseconds.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from kpt_lightning.measure.statistics import median
from kpt_lightning.measure.timer import StepTimes
from kpt_lightning.tracking.blocks import CAPACITY, MOST_STEPS, STEPS, Block, Blocks
from kpt_lightning.tracking.growth import LEAST_AFTER, LEAST_BEFORE, Growth, lasting_growth, steady_growth
from kpt_lightning.tracking.noise import Array
from kpt_lightning.tracking.series import Work

Kind = Literal["step_time", "data_wait", "memory"]
KINDS: tuple[Kind, ...] = ("step_time", "data_wait", "memory")

LONGEST_WAITS = 2
"""Of a block, left out: starting the workers of an epoch is no slow loader. Every fourth batch late still counts."""

VARYING = "varying"
"""In place of a shape, where no shape is that of most steps."""

SAME_WORK = 0.02
"""Relative change in the work of a step above which its time has a reason."""

THROTTLED = 0.97
"""Of the clock before, below which the clock is named as the cause: a choice, about the growth that is looked for."""


class DriftWarning(UserWarning):
    """A run got slower or bigger while it trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Something that grew while training, told once for each kind.

    Attributes:
        kind: What grew.
        since_step: Step from which on it is higher, to within a block.
        noticed_step: Step at which it was told.
        before: Level before, in seconds or bytes.
        after: Level since.
        growth: Growth over the level before; of ``data_wait``, over the time of a step.
        at_least: Lower end of the 95 % interval of ``growth``.
        cause: What it looks like, and what to do.
    """

    kind: Kind
    since_step: int
    noticed_step: int
    before: float
    after: float
    growth: float
    at_least: float
    cause: str

    @property
    def text(self) -> str:
        """One sentence."""
        what = {"step_time": "a step takes", "data_wait": "data wait grew by", "memory": "memory in use grew by"}
        share = f"{self.growth:.0%} (at least {self.at_least:.0%})"
        grown = {"step_time": f"{share} longer", "data_wait": f"{share} of a step", "memory": share}
        levels = f"{_shown(self.kind, self.before)} -> {_shown(self.kind, self.after)}"
        return f"{what[self.kind]} {grown[self.kind]} since about step {self.since_step:,}, {levels}: {self.cause}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-like data."""
        return asdict(self)


class Readings(Protocol):
    """What a detector reads at the end of a block, see :class:`.device_readings.DeviceReadings`."""

    def memory(self) -> float:
        """Bytes in use, NaN where unknown."""

    def clock(self) -> float:
        """MHz, NaN where unknown."""


class DriftDetector:
    """Looks for growth in one run.

    A block in which most batches have another shape than before begins a new row, as its steps take another time for a
    reason. Where shapes vary from step to step, steps are compared by their time per token, or sample, while the work
    of a step stays the same.

    Attributes:
        found: What was told.
        reshaped: Steps at which a new row began, the first and the last.
        reshapes: How often.
    """

    def __init__(self, readings: Readings, first_step: int = 1) -> None:
        """Start a run.

        Args:
            readings: Of the device.
            first_step: Number of the step that ``Work.index`` counts as 1.
        """
        self._readings, self._offset = readings, first_step - 1
        self.found: list[Drift] = []
        self.reshaped: tuple[int, int] | None = None
        self.reshapes = 0
        self._steps: list[StepTimes] = []
        self._blocks = Blocks()
        self._form: object = None
        self._usual_work = 1.0
        self._looks = 0

    def add(self, step: StepTimes) -> Sequence[Drift]:
        """Take in one step whose ``context`` is its :class:`.series.Work`; what was found by it, mostly nothing."""
        self._steps.append(step)
        if len(self._steps) < STEPS:
            return ()
        steps, self._steps = self._steps, []
        form, steps = _alike(steps)
        work = float(median([_work_of(step) for step in steps]) or 0.0)
        step_number = self._offset + steps[0].context.index
        if form != self._form:
            self._begin(form, work, step_number)
        if not self._blocks.add(self._block(steps, step_number, work)):
            return ()
        self._looks += 1
        return self._look(self._offset + steps[-1].context.index)

    def notes(self) -> tuple[str, ...]:
        """What a reader of the record must know."""
        told = tuple(f"drift: {drift.text}" for drift in self.found)
        if self.reshaped is None:
            return told
        where = f"at step {self.reshaped[0]:,}"
        if self.reshapes > 1:
            where = f"{self.reshapes} times between steps {self.reshaped[0]:,} and {self.reshaped[1]:,}"
        return (*told, f"the batches changed {where}: steps before and after were not compared for drift")

    def _begin(self, form: object, work: float, step_number: int) -> None:
        if self._form is not None:
            self.reshapes += 1
            self.reshaped = (step_number if self.reshaped is None else self.reshaped[0], step_number)
        self._form, self._usual_work, self._blocks = form, work or 1.0, Blocks()

    def _block(self, steps: Sequence[StepTimes], step_number: int, work: float) -> Block:
        times = [step.compute for step in steps]
        if self._form == VARYING:
            units = [_work_of(step) or self._usual_work for step in steps]
            times = [time / unit * self._usual_work for time, unit in zip(times, units, strict=True)]
        waits = sorted(step.data_wait for step in steps if step.data_wait is not None)
        waits = waits[: len(waits) - LONGEST_WAITS] if len(waits) > LONGEST_WAITS else waits
        return Block(
            first_step=step_number,
            step_time=median(times) or 0.0,
            data_wait=sum(waits) / len(waits) if waits else np.nan,
            work=work,
            memory=self._readings.memory(),
            clock=self._readings.clock(),
        )

    def _look(self, now: int) -> Sequence[Drift]:
        told = {drift.kind for drift in self.found}
        found: list[Drift] = []
        for kind in KINDS:
            growth = None if kind in told else self._growth(kind)
            if growth is not None:
                if kind == "step_time" and self._work_changed(growth):
                    self._begin(self._form, float(self._blocks.column("work")[-1]), now + 1)
                    return found
                found.append(self._drift(kind, growth, now))
        self.found += found
        return found

    def _growth(self, kind: Kind) -> Growth | None:
        values = self._blocks.column(kind)
        if kind == "data_wait":
            if np.isnan(values).any():
                return None
            values = values + self._usual_time()
        if kind != "memory" and (growth := lasting_growth(values, self._looks)) is not None:
            return growth
        start = self._next_to_each_other()
        growth = steady_growth(values[start:])
        return growth and replace(growth, index=growth.index + start)

    def _next_to_each_other(self) -> int:
        """First of the newest blocks without a gap between them."""
        return CAPACITY // 2 if self._blocks.steps == MOST_STEPS else 0

    def _usual_time(self) -> float:
        """Of a step: what a wait is held against. The longer one, as a slower step has slower pauses on a CPU."""
        times = self._blocks.column("step_time")
        return max(float(times[:LEAST_BEFORE].mean()), float(times[-LEAST_AFTER:].mean()))

    def _work_changed(self, growth: Growth) -> bool:
        before, after = self._sides("work", growth)
        return abs(after - before) > SAME_WORK * before

    def _sides(self, name: str, growth: Growth) -> tuple[float, float]:
        """Means of what was read before a growth and since; of the two halves where it grew all along."""
        values = self._blocks.column(name)
        index = (growth.index + len(values)) // 2 if growth.steady else growth.index
        return _mean_known(values[:index]), _mean_known(values[index:])

    def _drift(self, kind: Kind, growth: Growth, now: int) -> Drift:
        shift = self._usual_time() if kind == "data_wait" else 0.0
        return Drift(
            kind=kind,
            since_step=int(self._blocks.column("first_step")[growth.index]),
            noticed_step=now,
            before=growth.before - shift,
            after=growth.after - shift,
            growth=growth.relative,
            at_least=growth.at_least,
            cause=self._cause(kind, growth),
        )

    def _cause(self, kind: Kind, growth: Growth) -> str:
        if kind == "memory":
            return (
                "it grows with every step, as with a leak or a cache without a limit; look for losses or outputs kept"
            )
        if kind == "data_wait":
            return "the data loader does not keep up; look at its storage and num_workers"
        before, after = self._sides("clock", growth)
        if after < THROTTLED * before:
            return f"the clock fell from {before:.0f} to {after:.0f} MHz, as with heat or a power limit"
        if growth.steady:
            return "it grows little by little, as with state that is gone through in every step"
        return "nothing measured here explains it; look for other work on this machine"


def _alike(steps: list[StepTimes]) -> tuple[object, list[StepTimes]]:
    """The shape of most steps, and these; :data:`VARYING` and all where there is no such shape."""
    forms = [(step.context.shape, step.context.batches) for step in steps]
    form, count = Counter(forms).most_common(1)[0]
    if count == len(steps):
        return form, steps
    if 2 * count > len(steps):
        return form, [step for step, own in zip(steps, forms, strict=True) if own == form]
    return VARYING, steps


def _work_of(step: StepTimes) -> float:
    work: Work = step.context
    return float(work.samples if work.tokens is None else work.tokens)


def _mean_known(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _shown(kind: Kind, value: float) -> str:
    return f"{value / 2**20:,.0f} MiB" if kind == "memory" else f"{value * 1e3:.3g} ms"
