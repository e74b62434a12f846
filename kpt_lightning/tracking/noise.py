"""Noise between runs: its scale without the outliers, and its memory.

All functions take many series at once, one a row, as histories are judged in windows.

Sources:
    Winsorising: Tukey and McLaughlin 1963, https://www.jstor.org/stable/25049278; cut at 2.5 robust sigmas
    Bias of a lag-1 autocorrelation in short series: Kendall 1954, https://doi.org/10.1093/biomet/41.3-4.403
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_lightning.measure.statistics import MAD_TO_SIGMA

Array = NDArray[np.float64]
Counts = NDArray[np.intp]

CUT = 2.5
"""Values further than this many robust sigmas from their level are pulled in to it: 1.2 % of normal values."""

LONE_CUT = 1.5
"""Sigmas to which lone outliers are pulled in: what is known to be one weighs less than what may be noise."""

SURE_CUT = 3.5
"""Sigmas off its neighbourhood from which a lone value is an outlier for certain: once in 2,000 normal values."""

NEIGHBOURS = 3
"""Runs on each side that tell whether a value stands alone; their median outvotes one more outlier."""

CUT_TO_SIGMA = 1.0114
"""Standard deviation of normal data over that of the same data cut at 2.5 sigma, by the normal integral."""


def checked(name: str, values: Sequence[float], least: int) -> Array:
    """The values as an array.

    Raises:
        ValueError: They are not one row of finite numbers, or fewer than ``least``.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} of shape {array.shape}: must be one row of numbers, one for each run.")
    if len(array) < least:
        raise ValueError(f"{name} of {len(array)} values: needs at least {least}, one for each run.")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        where = int(bad[0])
        raise ValueError(f"{name}[{where}]={array[where]!r}: must be finite. Leave out runs that gave no number.")
    return array


def in_range(array: Array) -> Array:
    """The array times the power of two that brings its largest value to 0.5..1.

    The factor changes no digit and no relative shift, and keeps squares of huge and tiny values in range.
    """
    return np.asarray(np.ldexp(array, -int(np.frexp(np.abs(array).max(initial=0.0))[1])))


def side_medians(rows: Array, index: Counts) -> tuple[Array, Array]:
    """Medians before and from ``index`` on, one column each; ``index`` has one entry a row, inside the row."""
    after = np.arange(rows.shape[1]) >= index[:, None]
    return _masked_median(rows, ~after), _masked_median(rows, after)


def _masked_median(rows: Array, mask: NDArray[np.bool_]) -> Array:
    count = mask.sum(1)
    ordered = np.sort(np.where(mask, rows, np.inf), axis=1)
    place = np.arange(len(rows))
    return np.asarray((ordered[place, (count - 1) // 2] + ordered[place, count // 2])[:, None] / 2)


def scale_around(residuals: Array, levels: int) -> Array:
    """Robust standard deviation of each row, one column, after ``levels`` levels were taken off.

    The first guess is 1.4826 MAD; where more than half of a row is exactly its level, the plain deviation. The result
    is the deviation of the residuals cut at 2.5 first guesses, which wastes less data than the MAD. Squares are taken
    relative to the largest value, as one huge value among tiny ones would else leave them out of range.
    """
    degrees = max(residuals.shape[1] - levels, 1)
    plain = _root_of_squares(residuals, np.abs(residuals).max(axis=1, keepdims=True)) / math.sqrt(degrees)
    first = MAD_TO_SIGMA * np.median(np.abs(residuals), axis=1, keepdims=True) * math.sqrt(residuals.shape[1] / degrees)
    limit = CUT * np.where(first > 0.0, first, plain)
    cut = np.clip(residuals, -limit, limit)
    return np.asarray(CUT_TO_SIGMA * _root_of_squares(cut, limit) / math.sqrt(degrees))


def _root_of_squares(rows: Array, largest: Array) -> Array:
    relative = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0.0)
    return np.asarray(largest * np.sqrt((relative**2).sum(1, keepdims=True)))


def sigma_beside(rows: Array, index: Counts) -> Array:
    """Robust standard deviation of each row, one column, around its medians before and from ``index`` on."""
    before, after = side_medians(rows, index)
    return scale_around(rows - np.where(np.arange(rows.shape[1]) >= index[:, None], after, before), 2)


def without_lone_values(rows: Array, index: Counts) -> Array:
    """Rows whose lone outliers are pulled in to 1.5 sigmas outside their neighbourhood.

    A value stands alone when it is 2.5 sigmas or more from the medians of both the three runs before and the three
    after it; one of the first or last three when it is as far from the median of the three others of the first or last
    four and from both levels, before and from ``index`` on. The place of a step, three runs from an end or more, stays.
    """
    return _pulled_in(rows, sigma_beside(rows, index), _neighbourhood(rows, index))


def winsorised(rows: Array, index: Counts) -> Array:
    """Rows without outliers.

    A lone value that is an outlier for certain, and further from its neighbours than those of one side are from those
    of the other, tells nothing about levels or about the place of the step: it becomes the mean of what both sides say.
    Other lone values are pulled in to their neighbourhood, and all values to 2.5 sigmas outside both levels; not around
    the level of their own side, so that the place of the step is left open.
    """
    sigma, near = sigma_beside(rows, index), _neighbourhood(rows, index)
    least_off = np.maximum(SURE_CUT * sigma, near.most - near.least)
    certain = (rows < near.least - least_off) | (rows > near.most + least_off)
    calm = np.where(certain, near.middle, _pulled_in(rows, sigma, near))
    low, high = _levels(rows, index)
    return np.asarray(np.clip(calm, low - CUT * sigma, high + CUT * sigma))


class _Neighbourhood(NamedTuple):
    """What the runs beside each run say of its level: from least to most, and in the middle."""

    least: Array
    most: Array
    middle: Array


def _neighbourhood(rows: Array, index: Counts) -> _Neighbourhood:
    low, high = _levels(rows, index)
    nearby = _median_of_next_three(rows)
    earlier, later = nearby[:, : -NEIGHBOURS - 1], nearby[:, NEIGHBOURS + 1 :]
    ends = ((0, 0), (NEIGHBOURS, NEIGHBOURS))
    least, most = np.pad(np.minimum(earlier, later), ends), np.pad(np.maximum(earlier, later), ends)
    middle = least + (most - least) / 2
    for end in (np.arange(NEIGHBOURS + 1), np.arange(-1, -NEIGHBOURS - 2, -1)):
        for place in range(NEIGHBOURS):
            others = _median_of_next_three(rows[:, np.delete(end, place)])
            least[:, end[place]] = np.minimum(others, low)[:, 0]
            most[:, end[place]] = np.maximum(others, high)[:, 0]
            middle[:, end[place]] = others[:, 0]
    return _Neighbourhood(least, most, middle)


def _pulled_in(rows: Array, sigma: Array, near: _Neighbourhood) -> Array:
    calm = np.where(rows < near.least - CUT * sigma, near.least - LONE_CUT * sigma, rows)
    return np.where(rows > near.most + CUT * sigma, near.most + LONE_CUT * sigma, calm)


def standardised(rows: Array) -> Array:
    """Rows less their means, over their largest deviations; 0 where a row is constant. Squares of it stay in range."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    largest = np.abs(centred).max(axis=1, keepdims=True)
    return np.asarray(np.divide(centred, largest, out=np.zeros_like(rows), where=largest > 0.0))


def _levels(rows: Array, index: Counts) -> tuple[Array, Array]:
    before, after = side_medians(rows, index)
    return np.minimum(before, after), np.maximum(before, after)


def _median_of_next_three(rows: Array) -> Array:
    first, second, third = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
    lower, upper = np.minimum(first, second), np.maximum(first, second)
    return np.asarray(np.maximum(lower, np.minimum(upper, third)))


def autocorrelation(residuals: Array) -> float:
    """Lag-1 autocorrelation of one row, corrected for the bias ``-(1 + 3 r) / n`` of short series, 0 to 0.9."""
    total = float(residuals @ residuals)
    if total == 0.0:
        return 0.0
    raw = float(residuals[1:] @ residuals[:-1]) / total
    return min(max(raw + (1 + 3 * raw) / len(residuals), 0.0), 0.9)
