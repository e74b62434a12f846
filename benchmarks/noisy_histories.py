"""Synthetic histories of runs for the detector's benchmarks: level 1, noise of a given coefficient of variation."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int, int], Array]

OUTLIER_SHARE = 0.05
OUTLIER_SIGMAS = 10.0


def iid(rng: np.random.Generator, count: int, n: int) -> Array:
    return rng.standard_normal((count, n))


def autoregressive(rng: np.random.Generator, count: int, n: int, rho: float = 0.5) -> Array:
    values = rng.standard_normal((count, n))
    for place in range(1, n):
        values[:, place] = rho * values[:, place - 1] + np.sqrt(1 - rho**2) * values[:, place]
    return values


def skewed(rng: np.random.Generator, count: int, n: int) -> Array:
    """Log-normal with sigma 0.5 of the logarithm: skewness 1.75; mean 0, variance 1."""
    sigma = 0.5
    mean, variance = np.exp(sigma**2 / 2), (np.exp(sigma**2) - 1) * np.exp(sigma**2)
    return (np.exp(sigma * rng.standard_normal((count, n))) - mean) / np.sqrt(variance)


def outliers(rng: np.random.Generator, count: int, n: int) -> Array:
    """Normal; one in twenty lies ten standard deviations off, up or down."""
    off = OUTLIER_SIGMAS * rng.choice([-1.0, 1.0], (count, n))
    return rng.standard_normal((count, n)) + off * (rng.random((count, n)) < OUTLIER_SHARE)


def slow_outliers(rng: np.random.Generator, count: int, n: int) -> Array:
    """Normal; one in twenty lies above, by ten standard deviations on average, exponentially distributed."""
    off = rng.exponential(OUTLIER_SIGMAS, (count, n))
    return rng.standard_normal((count, n)) + off * (rng.random((count, n)) < OUTLIER_SHARE)


def drifting(rng: np.random.Generator, count: int, n: int) -> Array:
    """White noise on a random walk with steps of 0.15 standard deviations: outside the goals, shown for honesty."""
    return rng.standard_normal((count, n)) + 0.15 * np.cumsum(rng.standard_normal((count, n)), axis=1)


def two_modes(rng: np.random.Generator, count: int, n: int) -> Array:
    """Two levels, four standard deviations apart, drawn anew for each run: machines of two kinds."""
    return 0.5 * rng.standard_normal((count, n)) + 2.0 * rng.choice([-1.0, 1.0], (count, n))


NOISES: dict[str, Noise] = {
    "iid": iid,
    "skewed": skewed,
    "outliers 5 %": outliers,
    "slow outliers 5 %": slow_outliers,
    "AR(1) 0.5": autoregressive,
}
BEYOND_THE_GOALS: dict[str, Noise] = {
    "AR(1) 0.8": lambda rng, count, n: autoregressive(rng, count, n, 0.8),
    "drifting": drifting,
    "two modes": two_modes,
}


def with_step(rng: np.random.Generator, values: Array, shift: float) -> tuple[Array, NDArray[np.intp]]:
    """Each row with one step up by ``shift`` in its middle 40 %, and the index of the first shifted value."""
    count, n = values.shape
    index = rng.integers(int(np.ceil(0.3 * n)), int(0.7 * n) + 1, count)
    return values + shift * (np.arange(n) >= index[:, None]), index
