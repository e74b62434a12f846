"""Since when is a metric at another level? Change points in a history of runs.

A change is reported when four things hold: it is too large for chance by ranks (:mod:`.rank_statistic`), a step
explains the history better than the memory of its noise does (:mod:`.step_evidence`), its place is known
(:mod:`.step_place`), and three runs or more lie on each side. Nothing is drawn at random: the critical values stand in
:mod:`.thresholds`.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kpt_lightning.measure import statistics
from kpt_lightning.tracking.noise import (
    CUT,
    Array,
    autocorrelation,
    checked,
    in_range,
    side_medians,
    sigma_beside,
    standardised,
    winsorised,
    without_lone_values,
)
from kpt_lightning.tracking.rank_statistic import best_split, clear_split
from kpt_lightning.tracking.severity import DEFAULT_LIMITS, Severity, SeverityLimits, loss_interval
from kpt_lightning.tracking.step_evidence import step_over_memory
from kpt_lightning.tracking.step_place import step_place
from kpt_lightning.tracking.thresholds import PLACE_MASS, critical_evidence, critical_rank

CONFIDENCE = 0.95

FEWEST_RUNS = 8
"""Shorter histories are never judged: three runs against four are in order by chance once in 18 times."""

LONG_WINDOW, LONG_STRIDE = 60, 20
"""Runs judged together and the distance between such windows; older runs say little about today's level."""

SHORT_WINDOW, SHORT_STRIDE = 24, 6
"""Windows in which only clear steps count, so that a level that came and went again is not averaged away."""


@dataclass(frozen=True, slots=True)
class Change:
    """One lasting change of level.

    Attributes:
        index: Place in the history of the first run at the new level, from 0.
        shift: New level over old one, less 1; 0.03 is 3 % more. Infinite where the old level is 0.
        interval: 95 % interval of ``shift``.
        severity: "minor", "moderate" or "severe" by the end of the interval with the smaller loss, "improvement", or
            None where the loss may be below the smallest limit.
        confidence: Posterior probability, 0 to 1, that ``index`` is right to within two runs.
        first: Earliest index at which the new level may have begun, at 95 %; at most ``index``.
        last: Latest such index.
    """

    index: int
    shift: float
    interval: statistics.Interval
    severity: Severity | None
    confidence: float
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Window:
    start: int
    stop: int
    clear_only: bool = False


@dataclass(frozen=True, slots=True)
class _Found:
    """A change in a window: its place and the range of places, from ``start`` of the history, and how clear it is."""

    index: int
    margin: float
    mass: float
    first: int
    last: int

    def moved(self, start: int) -> "_Found":
        return replace(self, index=start + self.index, first=start + self.first, last=start + self.last)


def detect_changes(
    values: Sequence[float], *, higher_is_better: bool = False, limits: SeverityLimits = DEFAULT_LIMITS
) -> list[Change]:
    """Find the lasting changes of level in a history of runs.

    The cost is linear in the number of runs: windows of 60 runs, 20 apart, are judged, and split where the clearest
    change is until none is left. Equal histories give equal results.

    Args:
        values: One robust summary of each run, such as its median step time in seconds, oldest first; any unit, one
            unit for all. The run is the unit: steps inside a run are not independent and do not belong here.
        higher_is_better: True for a throughput, False for a time, memory or a loss.
        limits: From which loss on a change is minor, moderate, severe.

    Returns:
        Changes in order of their place. Empty below eight runs.

    Raises:
        ValueError: A value is not finite, or ``values`` is not one row of numbers.
    """
    history = in_range(checked("values", values, 0))
    found = _search(history)
    edges = [0, *(one.index for one in found), len(history)]
    return [
        _describe(history[edges[at] : edges[at + 2]], one, edges[at], higher_is_better, limits)
        for at, one in enumerate(found)
    ]


def _search(history: Array) -> list[_Found]:
    """Binary segmentation over overlapping windows, the clearest change first."""
    windows = _windows(len(history))
    judged = _judge(history, windows)
    found: list[_Found] = []
    while True:
        best = max((one for one in judged.values() if one is not None), key=lambda one: one.margin, default=None)
        if best is None:
            return sorted(found, key=lambda one: one.index)
        found.append(best)
        cut = [window for window in judged if window.start < best.index < window.stop]
        for window in cut:
            del judged[window]
        parts = [
            _Window(start, stop, window.clear_only)
            for window in cut
            for start, stop in ((window.start, best.index), (best.index, window.stop))
            if stop - start >= FEWEST_RUNS
        ]
        judged |= _judge(history, parts)


def _windows(n: int) -> list[_Window]:
    if n < FEWEST_RUNS:
        return []
    if n <= LONG_WINDOW:
        windows = [_Window(0, n)]
    else:
        starts = [*range(0, n - LONG_WINDOW, LONG_STRIDE), n - LONG_WINDOW]
        windows = [_Window(start, start + LONG_WINDOW) for start in starts]
    if n > SHORT_WINDOW:
        starts = [*range(0, n - SHORT_WINDOW, SHORT_STRIDE), n - SHORT_WINDOW]
        windows += [_Window(start, start + SHORT_WINDOW, clear_only=True) for start in starts]
    return windows


def _judge(history: Array, windows: Sequence[_Window]) -> dict[_Window, _Found | None]:
    judged: dict[_Window, _Found | None] = dict.fromkeys(windows)
    for kind in {(window.stop - window.start, window.clear_only) for window in windows}:
        alike = [window for window in judged if (window.stop - window.start, window.clear_only) == kind]
        rows = np.stack([history[window.start : window.stop] for window in alike])
        for row, one in _steps(rows, _looks(len(history), kind[1]), kind[1]).items():
            judged[alike[row]] = one.moved(alike[row].start)
    return judged


def _looks(n: int, clear_only: bool) -> int:
    """Windows of a kind that are judged at once: each short one, and of the long ones those that share no run."""
    if clear_only:
        return len(range(0, n - SHORT_WINDOW, SHORT_STRIDE)) + 1
    return max(1, n // LONG_WINDOW)


def _steps(rows: Array, looks: int, clear_only: bool) -> dict[int, _Found]:
    """The one change of each row that has one."""
    n = rows.shape[1]
    calm = without_lone_values(rows, best_split(rows)[1])
    index = clear_split(calm)
    if not clear_only:
        statistic, by_rank = best_split(calm)
        ranked = (index == 0) & (statistic > critical_rank(n, looks))
        index = np.where(ranked, by_rank, index)
    left = np.flatnonzero(index)
    if not len(left):
        return {}
    clean = standardised(winsorised(rows[left], index[left]))
    varied = clean.any(axis=1)
    left, clean = left[varied], clean[varied]
    margin = step_over_memory(clean) - critical_evidence(n, looks)
    places = step_place(clean)
    return {
        int(left[at]): _Found(
            index=int(places.index[at]), margin=float(margin[at]), mass=float(places.mass[at]),
            first=int(places.first[at]), last=int(places.last[at]),
        )
        for at in np.flatnonzero((margin > 0.0) & (places.mass > PLACE_MASS))
    }  # fmt: skip


@functools.lru_cache(maxsize=256)
def _t(degrees: int) -> float:
    return statistics.t_quantile((1 + CONFIDENCE) / 2, degrees)


def _describe(part: Array, one: _Found, start: int, higher_is_better: bool, limits: SeverityLimits) -> Change:
    """Size and severity of a change between the runs since the change before and those until the next."""
    shift, interval = relative_shift(part, one.index - start)
    severity = limits.of_loss(*loss_interval(interval.low, interval.high, higher_is_better))
    return Change(one.index, shift, interval, severity, min(one.mass, 1.0), one.first, one.last)


def relative_shift(values: Array, index: int) -> tuple[float, statistics.Interval]:
    """Level from ``index`` on over the level before it, less 1, and its 95 % interval.

    Levels are means of winsorised values; the interval is Student's, by the delta method for the ratio, widened by the
    square root of ``(1 + r) / (1 - r)`` for a lag-1 autocorrelation ``r`` of the residuals.
    """
    place = np.array([index])
    before, after = (float(side[0, 0]) for side in side_medians(values[None], place))
    sigma = float(sigma_beside(values[None], place)[0, 0])
    limit = CUT * sigma
    sides = [
        np.clip(values[:index], before - limit, before + limit),
        np.clip(values[index:], after - limit, after + limit),
    ]
    old, new = float(sides[0].mean()), float(sides[1].mean())
    ratio = new / old if old else math.inf
    if math.isinf(ratio):
        return math.copysign(math.inf, new), statistics.Interval(-math.inf, math.inf, CONFIDENCE, "the old level is 0")
    memory = autocorrelation(np.concatenate([sides[0] - old, sides[1] - new]))
    error = sigma / abs(old) * math.hypot(ratio / math.sqrt(len(sides[0])), 1 / math.sqrt(len(sides[1])))
    half = _t(max(len(values) - 2, 1)) * error * math.sqrt((1 + memory) / (1 - memory))
    shift = (new - old) / abs(old)
    return shift, statistics.Interval(shift - half, shift + half, CONFIDENCE)
