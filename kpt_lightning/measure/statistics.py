"""The one statistics module: robust, small-sample honest, pure Python.

Sources:
    Median, MAD and the factor 1.4826: https://en.wikipedia.org/wiki/Median_absolute_deviation
    Quantile of type 7: Hyndman and Fan 1996, https://doi.org/10.1080/00031305.1996.10473566
    Order-statistic interval of a median: https://en.wikipedia.org/wiki/Median#Sampling_distribution, exact binomial
    Interval of a ratio (MOVER): Zou and Donner 2008, https://doi.org/10.1002/sim.3095
    Student t with integer degrees of freedom: https://personal.math.ubc.ca/~cbm/aands/page_948.htm (26.7.3, 26.7.4)
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

MAD_TO_SIGMA = 1.4826
"""For normal data sigma = 1.4826 MAD: https://en.wikipedia.org/wiki/Median_absolute_deviation"""

MEDIAN_EFFICIENCY = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean, normal data: https://en.wikipedia.org/wiki/Median#Efficiency"""


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided confidence interval.

    Attributes:
        low: Lower end, ``-inf`` where the sample cannot bound it.
        high: Upper end, ``inf`` where the sample cannot bound it.
        confidence: Coverage that was asked for, 0 to 1.
        reason: Why the interval is infinite; empty where it is finite.
    """

    low: float
    high: float
    confidence: float
    reason: str = ""

    @property
    def finite(self) -> bool:
        """Whether both ends are known."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def half_width(self) -> float:
        """Half of ``high - low``."""
        return (self.high - self.low) / 2


def quantile(values: Sequence[float], q: float) -> float | None:
    """The quantile of type 7 (linear between order statistics), None for an empty sample.

    Raises:
        ValueError: When ``q`` is outside 0 to 1.
    """
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q={q!r}: must lie in 0 to 1. Give 0.5 for the median.")
    if not values:
        return None
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    if ordered[below] == ordered[above]:
        return ordered[below]
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median(values: Sequence[float]) -> float | None:
    """The median, None for an empty sample."""
    return quantile(values, 0.5)


def mad(values: Sequence[float]) -> float | None:
    """Median absolute deviation from the median, unscaled; None below two values."""
    center = median(values)
    if center is None or len(values) < 2:
        return None
    return median([abs(value - center) for value in values])


def robust_sigma(values: Sequence[float]) -> float | None:
    """Standard deviation estimated as 1.4826 MAD; None below two values."""
    deviation = mad(values)
    return None if deviation is None else MAD_TO_SIGMA * deviation


def robust_cv(values: Sequence[float]) -> float | None:
    """Robust coefficient of variation, ``robust_sigma / |median|``; None below two values or at a median of zero."""
    sigma, center = robust_sigma(values), median(values)
    return None if sigma is None or not center else sigma / abs(center)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Distribution-free interval of the median: two order statistics, coverage by the exact binomial.

    The interval is ``[x_(k), x_(n+1-k)]`` with the largest ``k`` such that ``2 P(Binomial(n, 1/2) < k)`` is at most
    ``1 - confidence``. It assumes independent values. No ``k`` exists below six values at 95 %.
    """
    n = len(values)
    tail, k, mass = (1.0 - confidence) / 2, 0, 0.0
    while k < n:
        mass += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if mass > tail:
            break
        k += 1
    if k == 0:
        reason = (
            f"{n} values cannot bound a median at {confidence:.0%}; at least {values_needed(confidence)} are needed"
        )
        return Interval(-math.inf, math.inf, confidence, reason)
    ordered = sorted(values)
    return Interval(ordered[k - 1], ordered[n - k], confidence)


def values_needed(confidence: float = 0.95) -> int:
    """Fewest values for which :func:`median_interval` is finite: ``2 (1/2)^n <= 1 - confidence``."""
    return math.ceil(1 - math.log2(1.0 - confidence) - 1e-9)


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], confidence: float = 0.95
) -> tuple[float | None, Interval]:
    """The ratio of two medians of positive values, with its interval.

    MOVER on the logarithm: with ``a``, ``b`` the log medians and ``(l, u)`` their order-statistic intervals, the ends
    are ``a - b - hypot(a - l_a, u_b - b)`` and ``a - b + hypot(u_a - a, b - l_b)``. Nothing is resampled.

    Returns:
        ``(ratio, interval)``; the ratio is None where a sample is empty or holds a value that is not positive.
    """
    if not numerator or not denominator:
        return None, Interval(-math.inf, math.inf, confidence, "a sample is empty")
    if min(min(numerator), min(denominator)) <= 0.0:
        return None, Interval(-math.inf, math.inf, confidence, "a ratio needs positive values")
    logs = [[math.log(value) for value in sample] for sample in (numerator, denominator)]
    (a, b), (a_in, b_in) = [median(log) or 0.0 for log in logs], [median_interval(log, confidence) for log in logs]
    ratio = math.exp(a - b)
    if not (a_in.finite and b_in.finite):
        return ratio, Interval(-math.inf, math.inf, confidence, a_in.reason or b_in.reason)
    low = math.exp(a - b - math.hypot(a - a_in.low, b_in.high - b))
    high = math.exp(a - b + math.hypot(a_in.high - a, b - b_in.low))
    return ratio, Interval(low, high, confidence)


def effective_size(values: Sequence[float]) -> float:
    """How many independent values the series is worth: ``n (1 - r) / (1 + r)``, at most ``n``, at least 1.

    ``r`` is the lag-1 autocorrelation of the series clipped at three robust sigmas, as of an AR(1) process:
    https://en.wikipedia.org/wiki/Effective_sample_size. Steps of one training run are not independent.
    """
    n, center, sigma = len(values), median(values), robust_sigma(values)
    if n < 4 or center is None or not sigma:
        return float(n)
    limit = 3 * sigma
    rest = [min(max(value - center, -limit), limit) for value in values]
    mean = math.fsum(rest) / n
    rest = [value - mean for value in rest]
    total = math.fsum(value * value for value in rest)
    if total == 0.0:
        return float(n)
    r = math.fsum(left * right for left, right in itertools.pairwise(rest)) / total
    r = min(max(r, 0.0), 0.999)
    return max(1.0, n * (1 - r) / (1 + r))


def t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) of Student's t with an integer number of degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    odd = degrees % 2 == 1
    term = cos if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    between = 2 / math.pi * (angle + sin * total) if odd else sin * total
    return 0.5 * (1 + between)


def t_quantile(p: float, degrees: int) -> float:
    """The ``p`` quantile of Student's t, ``0.5 <= p < 1``, by bisection of :func:`t_cdf`.

    Raises:
        ValueError: When ``degrees`` is below 1 or ``p`` is out of range.
    """
    if degrees < 1 or not 0.5 <= p < 1.0:
        raise ValueError(f"p={p!r}, degrees={degrees!r}: need 0.5 <= p < 1 and degrees >= 1. Use the upper tail.")
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < p else (low, middle)
    return high


def normal_quantile(p: float) -> float:
    """The ``p`` quantile of the standard normal distribution."""
    return NormalDist().inv_cdf(p)
