"""What the page shows of a history: for each run key its runs, levels, changes and how it stands now."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kpt_lightning.measure import statistics
from kpt_lightning.measure.statistics import Interval
from kpt_lightning.tracking.acks import Ack
from kpt_lightning.tracking.change_points import Change, detect_changes
from kpt_lightning.tracking.check import Checked, check_runs
from kpt_lightning.tracking.differences import environment_changes, environment_facts
from kpt_lightning.tracking.record import RunKey, RunRecord
from kpt_lightning.tracking.severity import loss_interval

RANKS = {"severe": 4.0, "moderate": 3.0, "minor": 2.0}
FAILED_RANK, UNSURE_RANK = 3.5, 1.0

MAIN_METRICS = ("step_time", "tokens_per_second", "samples_per_second", "mfu", "peak_memory")
"""The first of these that a key has stands for it in the overview."""


@dataclass(frozen=True, slots=True)
class Level:
    """Runs at one level, ``start`` to ``stop - 1``: their median and its 95 % interval."""

    start: int
    stop: int
    value: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class Step:
    """A lasting change between two runs: ``before`` is the last at the old level, ``after`` the first at the new."""

    before: int
    after: int
    levels: tuple[float, float]
    change: Change


@dataclass(frozen=True, slots=True)
class Move:
    """The environment before run ``index`` was another one: name to (old, new)."""

    index: int
    changes: Mapping[str, tuple[str | None, str | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricHistory:
    """One metric of one key.

    Attributes:
        name: Of the metric.
        unit: Of all values.
        higher_is_better: Its direction.
        values: One of each run of the key, in order; None where a run has none, or one that is not finite.
        levels: Of finished runs of one environment, oldest first.
        steps: Lasting changes inside one environment, oldest first.
        current: Whether the last step lies in the newest run's environment, so that it still stands.
        checked: The newest run against those before; None where it lacks the metric.
        acknowledged: The live acknowledgement of a regression of it, with which it needs no look.
        other_units: Runs left out because their values have another unit.
    """

    name: str
    unit: str
    higher_is_better: bool
    values: Sequence[float | None]
    levels: Sequence[Level]
    steps: Sequence[Step]
    current: bool
    checked: Checked | None
    acknowledged: Ack | None = None
    other_units: int = 0

    @property
    def decided(self) -> bool:
        """Whether the newest run alone differs from those before."""
        verdict = self.checked.verdict if self.checked else None
        return verdict is not None and verdict.outcome in ("regression", "improvement")

    @property
    def standing_step(self) -> Step | None:
        """The last change, where it still stands and the newest run has not moved again."""
        return self.steps[-1] if self.steps and self.current and not self.decided else None

    @property
    def rank(self) -> tuple[float, float]:
        """How bad it stands, the larger the worse, and the loss that is certain."""
        severity, loss = self._severity()
        return (min(severity, UNSURE_RANK) if self.acknowledged else severity), loss

    def _severity(self) -> tuple[float, float]:
        step, verdict = self.standing_step, self.checked.verdict if self.checked else None
        if step is not None:
            return RANKS.get(step.change.severity or "", 0.0), self._certain(step.change.interval)
        if verdict is None or verdict.outcome == "pass":
            return 0.0, 0.0
        if verdict.outcome == "regression":
            return RANKS.get(verdict.severity or "", UNSURE_RANK), self._certain(verdict.interval)
        return 0.0, self._certain(verdict.interval)

    def _certain(self, interval: Interval) -> float:
        return loss_interval(interval.low, interval.high, self.higher_is_better)[0] if interval.finite else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyHistory:
    """All runs of one key, oldest first, and what they show.

    Attributes:
        key: Of the runs.
        runs: Finished or not.
        metrics: The main one first.
        moves: Changes of the environment, oldest first.
        problems: What no metric tells, such as a newest run that failed.
    """

    key: RunKey
    runs: Sequence[RunRecord]
    metrics: Sequence[MetricHistory]
    moves: Sequence[Move]
    problems: Sequence[str]

    @property
    def rank(self) -> tuple[float, float]:
        """Of its worst metric."""
        worst = max((metric.rank for metric in self.metrics), default=(0.0, 0.0))
        return max(worst, (FAILED_RANK, 0.0)) if self.problems else worst


def histories(
    records: Sequence[RunRecord], acks: Sequence[Ack] = (), accepted: Collection[str] = ()
) -> list[KeyHistory]:
    """The history of each key, what is worst first.

    Args:
        records: Oldest first.
        acks: Acknowledgements of regressions; those that are not live are passed over.
        accepted: Ids of runs that somebody accepted as a base.
    """
    live = {(ack.key_digest, ack.metric): ack for ack in acks if ack.state() == "live"}
    by_key: dict[str, list[RunRecord]] = {}
    for record in records:
        by_key.setdefault(record.key.digest, []).append(record)
    found = [_history(runs, live, accepted) for runs in by_key.values()]
    return sorted(found, key=lambda each: (-each.rank[0], -each.rank[1], each.key.name))


def _history(runs: Sequence[RunRecord], live: Mapping[tuple[str, str], Ack], accepted: Collection[str]) -> KeyHistory:
    finished = [run for run in runs if run.status == "finished"]
    newest = {name: metric for run in runs for name, metric in run.metrics.items()}
    readable = [_readable(run, {name: metric.unit for name, metric in newest.items()}) for run in finished]
    checked = {each.metric: each for each in check_runs(readable, accepted=accepted) if not each.missing}
    places = _places(runs)
    metrics = [
        _metric(name, newest[name].unit, newest[name].better == "higher", runs, places, checked.get(name))
        for name in newest
    ]
    key = runs[-1].key.digest
    metrics = [replace(metric, acknowledged=live.get((key, metric.name))) for metric in metrics]
    metrics.sort(key=_order)
    moves = [
        Move(at + 1, changes)
        for at in range(len(runs) - 1)
        if (changes := environment_changes(runs[at], runs[at + 1]))
    ]  # fmt: skip
    return KeyHistory(key=runs[-1].key, runs=runs, metrics=metrics, moves=moves, problems=_problems(runs, finished))


def _order(metric: MetricHistory) -> tuple[int, float, str]:
    """The main ones, then what is worst."""
    place = MAIN_METRICS.index(metric.name) if metric.name in MAIN_METRICS else len(MAIN_METRICS)
    return place, -metric.rank[0], metric.name


def _readable(run: RunRecord, units: Mapping[str, str]) -> RunRecord:
    """The run with only the values that can be judged: finite, and of the metric's present unit."""
    kept = {
        name: metric
        for name, metric in run.metrics.items()
        if math.isfinite(metric.median) and metric.unit == units[name]
    }
    return replace(run, metrics=kept)


def _places(runs: Sequence[RunRecord]) -> list[list[int]]:
    """Places of the finished runs of each environment; the environment of the newest finished run comes last."""
    found: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for at, run in enumerate(runs):
        if run.status == "finished":
            found.setdefault(tuple(sorted(environment_facts(run).items())), []).append(at)
    return sorted(found.values(), key=lambda places: places[-1])


def _metric(
    name: str, unit: str, higher_is_better: bool, runs: Sequence[RunRecord], places: Sequence[Sequence[int]],
    checked: Checked | None,
) -> MetricHistory:  # fmt: skip
    measured = [run.metrics.get(name) for run in runs]
    values = [
        metric.median if metric is not None and metric.unit == unit and math.isfinite(metric.median) else None
        for metric in measured
    ]
    levels: list[Level] = []
    steps: list[Step] = []
    current = False
    for of_environment in places:
        known = [(at, value) for at in of_environment if (value := values[at]) is not None]
        part_levels, part_steps = _levels(known, higher_is_better)
        levels += part_levels
        steps += part_steps
        current = bool(part_steps)
    return MetricHistory(
        name=name, unit=unit, higher_is_better=higher_is_better, values=values, levels=levels, steps=steps,
        current=current, checked=checked,
        other_units=sum(metric is not None and metric.unit != unit for metric in measured),
    )  # fmt: skip


def _levels(known: Sequence[tuple[int, float]], higher_is_better: bool) -> tuple[list[Level], list[Step]]:
    values = [value for _, value in known]
    changes = detect_changes(values, higher_is_better=higher_is_better)
    edges = [0, *(change.index for change in changes), len(values)]
    levels = []
    for start, stop in pairwise(edges):
        middle = statistics.median(values[start:stop])
        if middle is not None:
            bounds = statistics.median_interval(values[start:stop])
            levels.append(Level(known[start][0], known[stop - 1][0] + 1, middle, bounds))
    steps = [
        Step(known[change.index - 1][0], known[change.index][0], (levels[at].value, levels[at + 1].value), change)
        for at, change in enumerate(changes)
    ]
    return levels, steps


def _problems(runs: Sequence[RunRecord], finished: Sequence[RunRecord]) -> list[str]:
    found = []
    if runs[-1].status != "finished":
        found.append(f"newest run {runs[-1].status}")
    if finished and finished[-1].loss_finite is False:
        found.append("a loss was not finite")
    return found
