import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpt_lightning.measure import statistics as s

NUMBERS = st.floats(min_value=-1e9, max_value=1e9)


@given(st.lists(NUMBERS, min_size=1, max_size=50))
def test_median_lies_inside_the_sample_and_ignores_order(values):
    center = s.median(values)
    assert min(values) <= center <= max(values)
    assert s.median(values[::-1]) == center


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([1, 2, 3, 4], 0.5, 2.5), ([1, 2, 3, 4], 0.25, 1.75), ([5], 0.9, 5), ([0, 10], 1.0, 10)],
)
def test_quantile_is_of_type_7(values, q, expected):
    assert s.quantile(values, q) == pytest.approx(expected)


def test_quantile_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match="0 to 1"):
        s.quantile([1.0], 1.5)


def test_an_empty_or_single_sample_has_no_spread():
    assert s.median([]) is None
    assert s.mad([3.0]) is None
    assert s.robust_cv([]) is None
    assert s.robust_cv([0.0, 0.0]) is None


def test_robust_cv_of_normal_data_is_its_cv_and_outliers_do_not_move_it():
    rng = random.Random(0)
    values = [rng.gauss(100, 2) for _ in range(4000)]
    spoiled = [*values, *[1e6] * 40]
    assert s.robust_cv(values) == pytest.approx(0.02, rel=0.05)
    assert s.robust_cv(spoiled) == pytest.approx(s.robust_cv(values), rel=0.05)


# Exact ranks at 95 %, table of the sign test: k is the lower rank, counted from 1.
@pytest.mark.parametrize(("n", "k"), [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (50, 18), (100, 40)])
def test_median_interval_uses_the_tabled_order_statistics(n, k):
    interval = s.median_interval(list(range(1, n + 1)))
    assert (interval.low, interval.high) == (k, n + 1 - k)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_median_interval_of_too_few_values_is_infinite_and_says_why(n):
    interval = s.median_interval([1.0] * n)
    assert not interval.finite
    assert "at least 6" in interval.reason


def test_median_interval_survives_a_large_sample():
    interval = s.median_interval([float(i) for i in range(20000)])
    assert interval.low == pytest.approx(10000 - 1.96 * math.sqrt(20000) / 2, abs=3)


def test_median_interval_covers_the_median_at_its_confidence():
    rng, hits = random.Random(1), 0
    for _ in range(1000):
        interval = s.median_interval([rng.lognormvariate(0, 1) for _ in range(15)])
        hits += interval.low <= 1.0 <= interval.high
    assert hits >= 940


def test_ratio_interval_covers_the_true_ratio():
    rng, hits = random.Random(2), 0
    for _ in range(1000):
        new = [1.1 * rng.lognormvariate(0, 0.1) for _ in range(12)]
        old = [rng.lognormvariate(0, 0.1) for _ in range(20)]
        _, interval = s.ratio_interval(new, old)
        hits += interval.low <= 1.1 <= interval.high
    assert 935 <= hits <= 1000


@pytest.mark.parametrize(("new", "old"), [([], [1.0]), ([1.0] * 9, [0.0] * 9), ([1.0] * 3, [1.0] * 9)])
def test_ratio_interval_is_infinite_with_a_reason_where_it_cannot_be_known(new, old):
    _, interval = s.ratio_interval(new, old)
    assert not interval.finite
    assert interval.reason


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_effective_size_follows_the_autocorrelation(rho):
    rng, value, values = random.Random(3), 0.0, []
    for _ in range(5000):
        value = rho * value + rng.gauss(0, 1)
        values.append(value)
    assert s.effective_size(values) / 5000 == pytest.approx((1 - rho) / (1 + rho), rel=0.15)


def test_effective_size_never_exceeds_the_sample_nor_falls_below_one():
    assert s.effective_size([1.0, -1.0] * 50) == 100
    assert 1 <= s.effective_size([float(i) for i in range(100)]) < 10
    assert s.effective_size([7.0] * 10) == 10


# https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm
@pytest.mark.parametrize(
    ("degrees", "p", "expected"),
    [(1, 0.975, 12.706), (2, 0.975, 4.303), (3, 0.975, 3.182), (4, 0.95, 2.132), (10, 0.975, 2.228), (30, 0.99, 2.457)],
)
def test_t_quantile_agrees_with_the_nist_table(degrees, p, expected):
    assert s.t_quantile(p, degrees) == pytest.approx(expected, abs=6e-4)


def test_t_quantile_out_of_range_is_refused():
    with pytest.raises(ValueError, match="degrees"):
        s.t_quantile(0.975, 0)


def test_normal_quantile():
    assert s.normal_quantile(0.975) == pytest.approx(1.959964, abs=1e-6)
