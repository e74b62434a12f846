"""Does a step explain a history better than the memory of its noise does? A Bayes factor.

Autocorrelated noise wanders and so fakes steps. Both sides of the comparison therefore allow for memory, an AR(1)
process of unknown lag-1 autocorrelation, and one of them adds a step of unknown size and place. What is unknown is
averaged over and not fitted, so that the side with more freedom has no advantage, however short the history.

Sources:
    Bayes factors of nested linear models: Liang et al. 2008, https://doi.org/10.1198/016214507000001337
    A step in a series, Bayesian: Smith 1975, https://doi.org/10.1093/biomet/62.2.407
"""

import math

import numpy as np

from kpt_lightning.tracking.noise import Array
from kpt_lightning.tracking.rank_statistic import LEAST_SIDE

AUTOCORRELATIONS = {0.0: 1 / 2, 0.15: 1 / 12, 0.3: 1 / 12, 0.45: 1 / 12, 0.6: 1 / 12, 0.75: 1 / 12, 0.9: 1 / 12}
"""Lag-1 autocorrelation to its prior probability: one history in two has no memory, the others any up to a slow drift.
"""

STEP_VARIANCES = {9.0: 1 / 2, 1e2: 1 / 4, 1e3: 1 / 8, 1e4: 1 / 8}
"""Prior variance of the step, in variances of the noise, to its probability: most steps are some three deviations
high, a few are a hundred. Such a mixture has the heavy tail without which a clear step in a short history loses."""

LARGEST_SHARE = 1 - 1e-12
"""Share of the squares that a step may explain at most: rounding decides beyond."""


def step_over_memory(rows: Array) -> Array:
    """Log Bayes factor of AR(1) noise with one step to AR(1) noise without, one entry a row.

    The level has a flat prior and the scale of the noise one flat in its logarithm; the prior of the place is
    proportional to ``k (n - k)`` as in :mod:`.step_place`.

    Args:
        rows: Standardised series of n runs without outliers, none of them constant.
    """
    n = rows.shape[1]
    place = np.arange(LEAST_SIDE, n - LEAST_SIDE + 1)
    prior = place * (n - place) / (place * (n - place)).sum()
    with_step, without = [], []
    for rho, weight in AUTOCORRELATIONS.items():
        null, left, explained, balance = _whitened(rows, rho, place)
        null += math.log(weight)
        without.append(null)
        share = np.minimum(explained / left[:, None], LARGEST_SHARE)
        for variance, chance in STEP_VARIANCES.items():
            gain = variance / (1 - rho * rho) * balance
            ratio = -0.5 * np.log1p(gain) - (n - 1) / 2 * np.log1p(-gain / (1 + gain) * share)
            with_step.append(null[:, None] + ratio + np.log(chance * prior))
    return _log_sum(np.concatenate(with_step, axis=1)) - _log_sum(np.stack(without, axis=1))


def _whitened(rows: Array, rho: float, place: np.ndarray) -> tuple[Array, Array, Array, Array]:
    """Regression on a level and a step at each place after the memory was taken out.

    Returns:
        Log likelihood without a step, up to a constant; the squares that the level leaves; those of them that each
        step explains; and the squares of each step that the level leaves.
    """
    n = rows.shape[1]
    first, later = math.sqrt(1 - rho * rho), 1 - rho
    white = np.concatenate([first * rows[:, :1], rows[:, 1:] - rho * rows[:, :-1]], axis=1)
    level = np.full(n, later)
    level[0] = first
    square, product = level @ level, white @ level
    left = np.maximum((white**2).sum(1) - product**2 / square, np.finfo(np.float64).tiny)
    after = np.cumsum(white[:, ::-1], axis=1)[:, ::-1]
    along = later + later**2 * (n - 1 - place)
    balance = 1 + later**2 * (n - 1 - place) - along**2 / square
    with_series = rho * white[:, place] + later * after[:, place] - along * product[:, None] / square
    null = math.log(first) - 0.5 * math.log(square) - (n - 1) / 2 * np.log(left)
    return null, left, with_series**2 / balance, balance


def _log_sum(logs: Array) -> Array:
    most = logs.max(axis=1)
    return np.asarray(most + np.log(np.exp(logs - most[:, None]).sum(1)))
