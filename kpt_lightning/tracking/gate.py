"""Are new runs worse than the runs before them? The gate of a pull request.

A history tells how runs scatter, so one new run can be judged; a few more settle what one cannot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kpt_lightning.measure.statistics import Interval
from kpt_lightning.tracking.change_points import CONFIDENCE, detect_changes
from kpt_lightning.tracking.noise import CUT, Array, autocorrelation, checked, in_range, scale_around
from kpt_lightning.tracking.severity import DEFAULT_LIMITS, Severity, SeverityLimits, loss_interval
from kpt_lightning.tracking.thresholds import GATE_FEWEST_RUNS, gate_quantiles

Outcome = Literal["pass", "regression", "improvement", "inconclusive"]

OUTLIER_SIGMAS = 3.5
"""An older run further off than this shows that runs like it happen: once in 2,000 normal runs."""

OUTLIER_REACH = 2.0
"""A single new run is no outlier of the known kind when it is more than this many times as far off as the worst."""

FEWEST_TO_CUT = 3
"""New runs from which one of them can be told for an outlier."""

NEW_CUT = 1.5
"""New runs count no further than this many sigmas of the baseline from their median: Huber's location of known scale
(https://doi.org/10.1214/aoms/1177703732), nearly as sharp as a mean, and one of three moves it by half a sigma at most.
"""

CUT_VARIANCE = 1.06
"""Variance of that location times the number of runs, for normal data and 3 to 15 runs, by simulation."""

MOST_RUNS = 100
"""More runs than this are not asked for: the baseline is too short or too noisy then."""

POWER = 0.84
"""Standard errors added so that the runs asked for suffice in 80 % of cases: the 80 % quantile of a normal."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the new runs show.

    Attributes:
        outcome: "regression" or "improvement" where chance alone would show as much once in 200 gates; "pass" where a
            loss of the ``resolution`` is excluded at 95 %; else "inconclusive".
        severity: As :class:`.change_points.Change` has it, by the loss that is certain; None for "pass" and
            "inconclusive", and for a regression that may be smaller than the smallest limit.
        shift: Level of the new runs over the level of the baseline, less 1.
        interval: 95 % interval of ``shift``.
        runs_needed: About how many more new runs would settle it; None where it is settled, or only a better
            baseline helps.
        baseline_runs: Runs that were compared with: those since the last change in the baseline.
        reason: One clause for the reader.
    """

    outcome: Outcome
    severity: Severity | None
    shift: float
    interval: Interval
    runs_needed: int | None
    baseline_runs: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Level:
    """Level and noise of a baseline: level, sigma between runs, autocorrelation, number of runs, all of one scale."""

    level: float
    sigma: float
    memory: float
    runs: int

    def error(self, new: int) -> float:
        """Standard error of the level of ``new`` runs less this one."""
        scatter = (1.0 if new < FEWEST_TO_CUT else CUT_VARIANCE) / new * _inflation(self.memory, new)
        return self.sigma * math.sqrt(scatter + _inflation(self.memory, self.runs) / self.runs)


def _inflation(memory: float, count: int) -> float:
    """Variance of a mean of ``count`` values of an AR(1) process over that of independent ones."""
    lags = np.arange(1, count)
    return 1.0 + 2.0 * float(((1 - lags / count) * memory**lags).sum())


def compare(
    baseline_runs: Sequence[float],
    new_runs: Sequence[float],
    *,
    higher_is_better: bool = False,
    limits: SeverityLimits = DEFAULT_LIMITS,
    resolution: float | None = None,
) -> Verdict:
    """Judge new runs by the level and the noise of the runs before them.

    The baseline counts from its last change on. The new runs are judged by their median, sharpened from three runs on,
    see :func:`new_level`, so that no minority of outliers decides; of two the one nearer to the baseline decides, and a
    single run no further off than twice the worst outlier of the baseline decides nothing. The limits are quantiles of
    a simulated robust t statistic, :mod:`.thresholds`, widened for autocorrelation.

    Args:
        baseline_runs: One value of each older run, oldest first; any unit, the same as ``new_runs``.
        new_runs: One value of each run of the candidate.
        higher_is_better: True for a throughput, False for a time, memory or a loss.
        limits: From which loss on a regression is minor, moderate, severe.
        resolution: Relative loss that must be excluded for a "pass"; ``limits.moderate`` where it is None.

    Raises:
        ValueError: A value is not finite, a sequence is empty or not one row, or ``resolution`` is not positive.
    """
    resolution = limits.moderate if resolution is None else resolution
    if not 0.0 < resolution < math.inf:
        raise ValueError(f"resolution={resolution!r}: must be positive and finite, a relative loss such as 0.05.")
    older, newer = checked("baseline_runs", baseline_runs, 1), checked("new_runs", new_runs, 1)
    together = in_range(np.concatenate([older, newer]))
    baseline, new = together[: len(older)], together[len(older) :]
    changes = detect_changes(baseline_runs)
    baseline = baseline[changes[-1].index if changes else 0 :]
    if len(baseline) < GATE_FEWEST_RUNS:
        return _unknown(baseline, new, f"{len(baseline)} runs before; at least {GATE_FEWEST_RUNS} are needed")
    return _judge(baseline, new, higher_is_better, limits, resolution)


def _judge(baseline: Array, new: Array, higher_is_better: bool, limits: SeverityLimits, resolution: float) -> Verdict:
    base = _level(baseline)
    if base.level == 0.0:
        return _unknown(baseline, new, "the level before is 0, so that no relative shift exists")
    decisive, usual = gate_quantiles(base.runs)
    error = base.error(len(new))
    found = new_level(new, base.level, base.sigma)
    estimate = found if len(new) >= FEWEST_TO_CUT else float(np.median(new))
    shift = (estimate - base.level) / abs(base.level)
    half = usual * error / abs(base.level)
    interval = Interval(shift - half, shift + half, CONFIDENCE)
    loss = loss_interval(interval.low, interval.high, higher_is_better)
    off = found - base.level
    if abs(off) > decisive * error:
        if len(new) == 1 and _is_known_outlier(baseline, base, off):
            return Verdict("inconclusive", None, shift, interval, 2, base.runs, "older runs were as far off once")
        worse = (off < 0.0) == higher_is_better
        severity = limits.of_loss(*loss) if worse else "improvement"
        outcome: Outcome = "regression" if worse else "improvement"
        return Verdict(outcome, severity, shift, interval, None, base.runs, f"beyond the noise of {base.runs} runs")
    if loss[1] < resolution:
        return Verdict("pass", None, shift, interval, None, base.runs, f"a loss of {resolution:.1%} is excluded")
    needed = _runs_needed(base, usual, resolution)
    if needed is None:
        reason = f"{base.runs} runs before, of this noise, cannot exclude a loss of {resolution:.1%}"
        return Verdict("inconclusive", None, shift, interval, None, base.runs, reason)
    more = max(needed - len(new), 1)
    reason = f"a loss of {resolution:.1%} is neither shown nor excluded; needs about {more} more runs"
    return Verdict("inconclusive", None, shift, interval, more, base.runs, reason)


def _unknown(baseline: Array, new: Array, reason: str) -> Verdict:
    level = float(np.median(baseline))
    shift = (float(np.median(new)) - level) / abs(level) if level else math.nan
    interval = Interval(-math.inf, math.inf, CONFIDENCE, reason)
    return Verdict("inconclusive", None, shift, interval, None, len(baseline), reason)


def level_of(rows: Array) -> tuple[Array, Array]:
    """Level and robust sigma of each row: mean of the values cut at 2.5 sigmas around the median."""
    center = np.median(rows, axis=1, keepdims=True)
    sigma = scale_around(rows - center, 1)
    return np.clip(rows, center - CUT * sigma, center + CUT * sigma).mean(axis=1), sigma[:, 0]


def _level(runs: Array) -> _Level:
    levels, sigmas = level_of(runs[None])
    level, sigma = float(levels[0]), float(sigmas[0])
    memory = autocorrelation(np.clip(runs - level, -CUT * sigma, CUT * sigma))
    # One standard error less: independent runs would pay for the scatter of the estimate otherwise.
    return _Level(level, sigma, max(memory - 1 / math.sqrt(len(runs)), 0.0), len(runs))


def new_level(new: Array, level: float, sigma: float) -> float:
    """Level of the new runs: their cautious median, from three on with the rest counted as far as :data:`NEW_CUT`.

    The cautious median of an even number is the middle value nearer to ``level``, and ``level`` itself between the two.
    """
    ordered = np.sort(new)
    low, high = float(ordered[(len(new) - 1) // 2]), float(ordered[len(new) // 2])
    center = min(max(level, low), high)
    if len(new) < FEWEST_TO_CUT:
        return center
    return center + float(np.clip(new - center, -NEW_CUT * sigma, NEW_CUT * sigma).mean())


def _is_known_outlier(baseline: Array, base: _Level, off: float) -> bool:
    worst = float(np.abs(baseline - base.level).max())
    return worst > OUTLIER_SIGMAS * base.sigma and abs(off) <= OUTLIER_REACH * worst


def _runs_needed(base: _Level, quantile: float, resolution: float) -> int | None:
    """New runs in all with which an unchanged level would most likely exclude a loss of ``resolution``."""
    enough = resolution * abs(base.level) / (quantile + POWER)
    return next((count for count in range(1, MOST_RUNS + 1) if base.error(count) <= enough), None)
