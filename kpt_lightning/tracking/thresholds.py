"""Critical values of the change-point detector, calibrated by simulation.

``benchmarks/calibrate_detector.py`` prints every number of this file again and the false-alarm rates they give.
"""

import math

import numpy as np

LEVEL = 0.015
"""False alarms of one look by ranks alone, up to :data:`REFERENCE` runs; the other conditions leave less
than half of them there (benchmarks/results/detector_2026-11-23.md)."""

REFERENCE = 30
"""Runs at which the level is largest. Later looks at a growing history share a budget, so the level falls as 1 / n^2,
whose sum over all later looks is finite (alpha spending: Lan and DeMets 1983, https://doi.org/10.1093/biomet/70.3.659).
"""

RANK_LEVELS = (1e-2, 1e-3, 1e-4)
RANK_QUANTILES = {
    8: (2.239, 2.239, 2.239),
    10: (2.453, 2.520, 2.538),
    12: (2.586, 2.771, 2.771),
    15: (2.743, 3.028, 3.100),
    20: (2.882, 3.270, 3.508),
    25: (2.977, 3.422, 3.724),
    30: (3.028, 3.529, 3.839),
    40: (3.104, 3.640, 4.097),
    50: (3.150, 3.706, 4.106),
    60: (3.188, 3.769, 4.232),
}
"""Upper quantiles of ``rank_statistic.best_split`` for n independent normal values without their lone outliers, 300,000
series each."""

MEMORY_EVIDENCE = 0.6
"""Log Bayes factor of a step to memory alone at :data:`REFERENCE` runs, beside the test by ranks."""

MEMORY_SLOPE = 6.0
"""More evidence asked per unit of |log(n / 30)|: few runs cannot tell memory from a step, many are looked at again."""

SLOPE_FROM = 20
"""Shorter histories are asked for no more evidence than this many runs: what is averaged over already makes the Bayes
factor cautious there, and alarms on AR(1) noise stay below 1 %."""

PLACE_MASS = 0.75
"""Posterior probability that the place is right to within two, below which a change is not reported yet."""


def critical_rank(n: int, looks: int = 1) -> float:
    """Value that the rank statistic of ``n`` runs must exceed when ``looks`` windows are judged at once.

    Log-linear between the sizes and the levels of :data:`RANK_QUANTILES`, and beyond the smallest level.
    """
    level = LEVEL * min(1.0, (REFERENCE / n) ** 2) / looks
    sizes = list(RANK_QUANTILES)
    at = [
        float(np.interp(math.log(n), np.log(sizes), [RANK_QUANTILES[size][column] for size in sizes]))
        for column in range(len(RANK_LEVELS))
    ]
    right = 1 if level >= RANK_LEVELS[1] else 2
    share = math.log(level / RANK_LEVELS[right - 1]) / math.log(RANK_LEVELS[right] / RANK_LEVELS[right - 1])
    return at[right - 1] + share * (at[right] - at[right - 1])


def critical_evidence(n: int, looks: int = 1) -> float:
    """Log Bayes factor against memory that ``n`` runs must exceed; the odds of ``looks`` windows add up."""
    return MEMORY_EVIDENCE + MEMORY_SLOPE * abs(math.log(max(n, SLOPE_FROM) / REFERENCE)) + math.log(looks)


GATE_FEWEST_RUNS = 5
"""Runs that a baseline needs: the limits are ten sigmas wide already."""

GATE_QUANTILES = {
    5: (11.69, 3.63),
    6: (6.59, 2.96),
    7: (6.21, 2.79),
    8: (4.98, 2.58),
    10: (4.30, 2.42),
    12: (3.98, 2.31),
    15: (3.58, 2.20),
    20: (3.34, 2.15),
    30: (3.14, 2.07),
    50: (2.99, 2.03),
    100: (2.93, 2.01),
    200: (2.88, 1.97),
}
"""Two-sided quantiles, 99.5 % and 95 %, of the level of new runs less that of n older ones, over its standard error by
:mod:`.gate`; normal values, the largest of 1, 3, 5 and 9 new runs, 40,000 series each."""


def gate_quantiles(runs: int) -> tuple[float, float]:
    """Limits in standard errors for ``runs`` older runs: of a verdict, and of the 95 % interval."""
    sizes = np.log(list(GATE_QUANTILES))
    decisive, usual = zip(*GATE_QUANTILES.values(), strict=True)
    return float(np.interp(math.log(runs), sizes, decisive)), float(np.interp(math.log(runs), sizes, usual))
