"""Where exactly is the step? The posterior of its place, given that there is one."""

from dataclasses import dataclass

import numpy as np

from kpt_lightning.tracking.noise import Array, Counts
from kpt_lightning.tracking.rank_statistic import LEAST_SIDE

NEAR = 2
"""A place is right when it is at most this many runs off; the place reported has most posterior within it."""

COVERED = 0.95
"""Posterior probability of the range of places that is reported."""

SMALLEST_RESIDUAL = 1e-12
"""Residual sum of squares, relative to the total, below which two levels explain a series completely."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the step of each row is.

    Attributes:
        index: First value after the step, the place that is most likely right to within two.
        mass: Posterior probability that ``index`` is right to within two.
        first: Earliest place of the shortest range that holds 95 % of the posterior.
        last: Latest place of that range.
    """

    index: Counts
    mass: Array
    first: Counts
    last: Counts


def step_place(rows: Array) -> Places:
    """Where one step is, given that there is one.

    With flat priors on both levels and on log sigma the posterior of a split is
    ``SSE_k^(-(n - 2) / 2) (k (n - k))^(-1/2)`` (Smith 1975, https://doi.org/10.1093/biomet/62.2.407), times a prior
    proportional to ``k (n - k)``, which is the evidence that a split there can carry.

    Args:
        rows: Standardised series of n runs without outliers, none of them constant.
    """
    n = rows.shape[1]
    total = (rows**2).sum(1, keepdims=True)
    k = np.arange(LEAST_SIDE, n - LEAST_SIDE + 1)
    balance = k * (n - k) / n
    explained = np.cumsum(rows, axis=1)[:, k - 1] ** 2 / balance
    left = np.maximum(total - explained, SMALLEST_RESIDUAL * total)
    log_posterior = -(n - 2) / 2 * np.log(left / total) + 0.5 * np.log(balance)
    posterior = np.exp(log_posterior - log_posterior.max(axis=1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    running = np.cumsum(np.pad(posterior, ((0, 0), (NEAR + 1, NEAR))), axis=1)
    mass = running[:, 2 * NEAR + 1 :] - running[:, : -(2 * NEAR + 1)]
    # Flat tops, as of a posterior on one place, are resolved to their most likely place.
    at = (mass + 1e-3 * posterior).argmax(axis=1)
    first, last = _shortest_range(posterior)
    return Places(k[at], mass[np.arange(len(rows)), at], k[np.minimum(first, at)], k[np.maximum(last, at)])


def _shortest_range(posterior: Array) -> tuple[Counts, Counts]:
    """First and last entry of the shortest run of entries with the mass asked for, one a row."""
    rows, count = np.arange(len(posterior)), posterior.shape[1]
    upto = np.cumsum(np.pad(posterior, ((0, 0), (1, 0))), axis=1)
    first, last = np.zeros(len(rows), dtype=np.intp), np.full(len(rows), count - 1)
    for length in range(count, 0, -1):
        held = upto[:, length:] - upto[:, : count + 1 - length]
        best = held.argmax(axis=1)
        enough = held[rows, best] >= COVERED
        first = np.where(enough, best, first)
        last = np.where(enough, best + length - 1, last)
    return first, last
