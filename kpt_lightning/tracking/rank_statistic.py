"""Where would one step split a history best, and how clear is it? By ranks, so that no noise shape can fake it.

Under noise without memory every order of the values is equally likely whatever their distribution, so one table of
critical values holds for normal, skewed and outlier-ridden runs. It holds nearly once lone outliers were pulled in,
without which they would hide a true step: benchmarks/results/detector_2026-11-23.md.

Sources:
    Normal scores: van der Waerden 1952; as efficient as the t-test for normal data, more for all others (Chernoff and
    Savage 1958, https://doi.org/10.1214/aoms/1177706436)
    Rank test for a change at an unknown place: Pettitt 1979, https://doi.org/10.2307/2346729
    Weights against the ends: Csorgo and Horvath 1997, Limit Theorems in Change-Point Analysis, section 2.1
"""

import functools
from statistics import NormalDist

import numpy as np

from kpt_lightning.tracking.noise import Array, Counts, side_medians, sigma_beside

LEAST_SIDE = 3
"""Fewest runs on each side of a step: one or two are outliers until proved otherwise."""

WEIGHT = 0.3
"""Power of ``4 k (n - k) / n^2``: between 0, which spends most false alarms near the ends, and 0.5, plain CUSUM."""

CLEAR_GAP = 5.0
"""Sigmas between the medians from which a complete separation counts where ranks alone cannot: close to an end."""


@functools.cache
def _scores(count: int) -> Array:
    places = np.arange(1, count + 1) / (count + 1)
    return np.array([NormalDist().inv_cdf(float(place)) for place in places])


def normal_scores(rows: Array) -> Array:
    """Normal quantiles of the ranks of each row; ties share the mean of theirs."""
    count, n = rows.shape
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    fresh = np.ones((count, n), dtype=bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = np.cumsum(fresh) - 1
    mean = np.bincount(group, np.tile(_scores(n), count)) / np.bincount(group)
    scores = np.empty((count, n))
    np.put_along_axis(scores, order, mean[group].reshape(count, n), axis=1)
    return scores


def best_split(rows: Array) -> tuple[Array, Counts]:
    """The largest weighted rank statistic of each row, and the index of the first value after that split.

    The statistic of a split into ``k`` and ``n - k`` values is the standardised sum of normal scores of one side, times
    ``(4 k (n - k) / n^2)^0.3``. It is 0 where all values are equal.
    """
    n = rows.shape[1]
    scores = normal_scores(rows)
    spread = np.sqrt((scores**2).sum(1, keepdims=True) / (n - 1))
    k = np.arange(LEAST_SIDE, n - LEAST_SIDE + 1)
    sums = np.abs(np.cumsum(scores, axis=1)[:, k - 1])
    balance = k * (n - k) / n
    statistic = sums / np.sqrt(balance) * (4 * balance / n) ** WEIGHT
    statistic = np.divide(statistic, spread, out=np.zeros_like(statistic), where=spread > 1e-12)
    at = statistic.argmax(axis=1)
    return statistic[np.arange(len(rows)), at], k[at]


def clear_split(rows: Array) -> Counts:
    """Index of a step that no eye would miss, 0 where there is none.

    All values of one side lie above all of the other and the medians are at least five robust sigmas apart. Three runs
    at an end can never be significant by ranks among 30, however far off they are.
    """
    count, n = rows.shape
    k = np.arange(LEAST_SIDE, n - LEAST_SIDE + 1)
    up = np.minimum.accumulate(rows[:, ::-1], axis=1)[:, ::-1][:, k] - np.maximum.accumulate(rows, axis=1)[:, k - 1]
    down = np.minimum.accumulate(rows, axis=1)[:, k - 1] - np.maximum.accumulate(rows[:, ::-1], axis=1)[:, ::-1][:, k]
    gap = np.maximum(up, down)
    at = gap.argmax(axis=1)
    index = np.zeros(count, dtype=np.intp)
    apart = np.flatnonzero(gap[np.arange(count), at] > 0.0)
    if len(apart):
        found = k[at[apart]]
        before, after = side_medians(rows[apart], found)
        sigma = sigma_beside(rows[apart], found)
        wide = (np.abs(after - before) > CLEAR_GAP * sigma)[:, 0]
        index[apart[wide]] = found[wide]
    return index
