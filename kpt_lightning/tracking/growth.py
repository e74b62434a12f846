"""Did a reading grow to stay? Tests for a row of blocks that is looked at again after every new block.

A growth must be beyond chance, by Student's t of the best split with the memory of the blocks in its error, and worth
a word. Chance gets a budget: a look may be wrong with probability :data:`LEVEL`, falling as 1 / looks^2 after the first
:data:`LOOKS`, so that the sum over a run of any length is finite (alpha spending: Lan and DeMets 1983,
https://doi.org/10.1093/biomet/70.3.659). ``benchmarks/drift_table.py`` prints the false-alarm rates that this gives.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from kpt_lightning.measure import statistics
from kpt_lightning.tracking.change_points import CONFIDENCE, relative_shift
from kpt_lightning.tracking.noise import Array, Counts

LEAST_BEFORE, LEAST_AFTER = 5, 3
"""Blocks on each side of a split, those after it nearer to the new level. Two slow blocks are a visitor, no drift."""

LEAST_GROWTH = 0.03
"""Relative growth that must be certain at 95 %: a choice; a GPU that warms up loses 1 to 2 % in any run."""

LEVEL = 5e-7
"""Probability of chance in one look, before the choice of the best split. Chosen by ``benchmarks/drift_table.py``."""

WORTH_A_TEST = 3.0
"""Standard errors below which the test, whose level asks for 4.9 and more, is not made."""

LOOKS = 200
"""Looks at a run of 10,000 steps: 120 at blocks of 32 steps, 64 at 64, the rest at 128."""

SEGMENTS = 12
"""Parts of a row that must each be above the one before for a steady growth: by chance once in 479 million orders."""

STEADY_SHARE = 1 / 3
"""Of the mean rise from part to part that each rise must reach; what fills up and stops does not."""


@dataclass(frozen=True, slots=True)
class Growth:
    """A level that rose.

    Attributes:
        index: Block from which on the level is higher.
        before: Level before it.
        after: Level since.
        relative: ``after / before - 1``.
        at_least: Lower end of the 95 % interval of ``relative``.
        steady: Whether it rose all along and not at one place.
    """

    index: int
    before: float
    after: float
    relative: float
    at_least: float
    steady: bool


def lasting_growth(values: Array, looks: int) -> Growth | None:
    """A step up that lasts to the end of the row.

    Args:
        values: Positive; one of each block, oldest first.
        looks: How often this run's row was tested, this time included.
    """
    n = len(values)
    if n < LEAST_BEFORE + LEAST_AFTER:
        return None
    middle = float(np.median(values))
    # One wild block must not lift the level before for good.
    calm = np.minimum(values, 2 * middle)
    if middle <= 0.0 or _rise(calm).max() < LEAST_GROWTH:
        return None
    index = _best_split(calm)
    before, after = float(np.median(values[:index])), float(np.median(values[index:]))
    if (values[index:] > (before + after) / 2).sum() < LEAST_AFTER or not _is_worth_a_test(calm, index):
        return None
    shift, interval = relative_shift(values, index)
    if not LEAST_GROWTH <= interval.low < math.inf or _chance(shift, interval, n) > _level(looks):
        return None
    return Growth(index, before, after, shift, interval.low, steady=False)


def steady_growth(values: Array) -> Growth | None:
    """A rise all along the row, as a leak makes one: each of twelve parts above the one before, none slowing down."""
    n = len(values)
    if n < 2 * SEGMENTS or values[0] <= 0.0:
        return None
    part = n // SEGMENTS
    # Cheap, for most rows; False for NaN too.
    if not values[-part:].mean() > (1 + LEAST_GROWTH) * values[:part].mean():
        return None
    levels = np.array([np.median(part) for part in np.array_split(values, SEGMENTS)])
    rises = np.diff(levels)
    mean = float(rises.mean())
    error = float(rises.std(ddof=1)) / math.sqrt(len(rises))
    least = (mean - _t(len(rises) - 1) * error) * len(rises) / levels[0]
    if rises.min() <= STEADY_SHARE * mean or least < LEAST_GROWTH:
        return None
    first, last = float(levels[0]), float(levels[-1])
    return Growth(0, first, last, last / first - 1, float(least), steady=True)


def _splits(n: int) -> Counts:
    return np.arange(LEAST_BEFORE, n - LEAST_AFTER + 1)


def _rise(values: Array) -> Array:
    """Mean from each split on over the mean before it, less 1."""
    n, k, sums = len(values), _splits(len(values)), np.cumsum(values)
    before = sums[k - 1]
    return np.asarray((sums[-1] - before) * k / (before * (n - k)) - 1)


def _best_split(values: Array) -> int:
    """Of least squares, on running medians of three, which keep steps in place and lone blocks out."""
    first, second, third = values[:-2], values[1:-1], values[2:]
    low, high = np.minimum(first, second), np.maximum(first, second)
    smooth = np.concatenate([values[:1], np.maximum(low, np.minimum(high, third)), values[-1:]])
    smooth -= smooth.mean()
    k = _splits(len(values))
    return int(k[(-np.cumsum(smooth)[k - 1] / np.sqrt(k * (len(values) - k))).argmax()])


def _is_worth_a_test(values: Array, index: int) -> bool:
    """A cheap t, by the noise of neighbours, which memory makes too large and never too small."""
    noise = statistics.MAD_TO_SIGMA * float(np.median(np.abs(np.diff(values)))) / math.sqrt(2)
    error = noise * math.sqrt(1 / index + 1 / (len(values) - index))
    return float(values[index:].mean() - values[:index].mean()) > WORTH_A_TEST * error


@functools.lru_cache(maxsize=256)
def _t(degrees: int) -> float:
    return statistics.t_quantile((1 + CONFIDENCE) / 2, degrees)


def _chance(shift: float, interval: statistics.Interval, n: int) -> float:
    if interval.half_width == 0.0:
        return 0.0
    return 1.0 - statistics.t_cdf(shift / interval.half_width * _t(n - 2), n - 2)


def _level(looks: int) -> float:
    return LEVEL * min(1.0, (LOOKS / looks) ** 2)
