"""Where exactly is the step? The posterior of its place, given that there is one."""

import numpy as np

from kpt_lightning.tracking.noise import Array, Counts
from kpt_lightning.tracking.rank_statistic import LEAST_SIDE

NEAR = 2
"""A place is right when it is at most this many runs off; the place reported has most posterior within it."""

SMALLEST_RESIDUAL = 1e-12
"""Residual sum of squares, relative to the total, below which two levels explain a series completely."""


def step_place(rows: Array) -> tuple[Counts, Array, Array]:
    """The index of the first value after the step that is most likely right to within two.

    With flat priors on both levels and on log sigma the posterior of a split is
    ``SSE_k^(-(n - 2) / 2) (k (n - k))^(-1/2)`` (Smith 1975, https://doi.org/10.1093/biomet/62.2.407), times a prior
    proportional to ``k (n - k)``, which is the evidence that a split there can carry.

    Args:
        rows: Winsorised series, none of them constant.

    Returns:
        ``(index, mass, residual)``: the place, the posterior probability that it is right to within two, and the sum of
        squares that the best split leaves.
    """
    n = rows.shape[1]
    centred = rows - rows.mean(axis=1, keepdims=True)
    total = (centred**2).sum(1, keepdims=True)
    k = np.arange(LEAST_SIDE, n - LEAST_SIDE + 1)
    balance = k * (n - k) / n
    explained = np.cumsum(centred, axis=1)[:, k - 1] ** 2 / balance
    left = np.maximum(total - explained, SMALLEST_RESIDUAL * total)
    log_posterior = -(n - 2) / 2 * np.log(left / total) + 0.5 * np.log(balance)
    posterior = np.exp(log_posterior - log_posterior.max(axis=1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    running = np.cumsum(np.pad(posterior, ((0, 0), (NEAR + 1, NEAR))), axis=1)
    mass = running[:, 2 * NEAR + 1 :] - running[:, : -(2 * NEAR + 1)]
    # Flat tops, as of a posterior on one place, are resolved to their most likely place.
    at = (mass + 1e-3 * posterior).argmax(axis=1)
    return k[at], mass[np.arange(len(rows)), at], left.min(axis=1)
