import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_lightning.tracking.gate import compare, new_level
from kpt_lightning.tracking.severity import SeverityLimits

SERIES = 300


def runs(variation, new, shift=0.0, *, rho=0.0, seed=0, count=SERIES):
    values = np.random.default_rng(seed).standard_normal((count, 30 + new))
    for place in range(1, 30 + new):
        values[:, place] = rho * values[:, place - 1] + math.sqrt(1 - rho**2) * values[:, place]
    values = 1 + variation * values
    values[:, 30:] += shift
    return [(row[:30], row[30:]) for row in values]


def share(pairs, *outcomes, **options):
    return sum(compare(*pair, **options).outcome in outcomes for pair in pairs) / len(pairs)


@pytest.mark.parametrize("new", [1, 2, 3, 5])
@pytest.mark.parametrize(("rho", "most"), [(0.0, 0.01), (0.5, 0.05)])
def test_an_unchanged_level_is_rarely_called_changed(rho, most, new):
    assert share(runs(0.03, new, rho=rho), "regression", "improvement") <= most


@pytest.mark.parametrize(("variation", "shift", "new", "least"), [(0.01, 0.05, 1, 0.90), (0.03, 0.10, 3, 0.95)])
def test_regressions_are_found_with_few_new_runs(variation, shift, new, least):
    assert share(runs(variation, new, shift), "regression") >= least
    assert share(runs(variation, new, -shift), "improvement") >= least


@pytest.mark.parametrize("new", [1, 2, 3, 5])
def test_the_interval_holds_the_true_shift(new):
    verdicts = [compare(*pair) for pair in runs(0.02, new, 0.04)]
    inside = sum(verdict.interval.low <= 0.04 <= verdict.interval.high for verdict in verdicts)
    assert inside / len(verdicts) >= 0.92


@pytest.mark.parametrize(
    ("shift", "outcome", "severity"),
    [
        (0.0, "pass", None),
        (0.005, "regression", None),
        (0.03, "regression", "minor"),
        (0.10, "regression", "moderate"),
        (0.30, "regression", "severe"),
        (-0.10, "improvement", "improvement"),
    ],
)
def test_severity_follows_the_loss_that_is_certain(shift, outcome, severity):
    ((before, after),) = runs(0.001, 3, shift, count=1)
    verdict = compare(before, after)
    assert (verdict.outcome, verdict.severity) == (outcome, severity)
    assert verdict.shift == pytest.approx(shift, abs=0.002)
    assert verdict.runs_needed is None


def test_a_drop_of_a_throughput_is_a_regression():
    ((before, after),) = runs(0.001, 3, -0.10, count=1)
    verdict = compare(before, after, higher_is_better=True)
    assert (verdict.outcome, verdict.severity) == ("regression", "moderate")


def test_noise_that_hides_a_loss_is_inconclusive_and_says_how_many_runs_settle_it():
    ((before, after),) = runs(0.03, 1, 0.04, count=1)
    verdict = compare(before, after)
    assert verdict.outcome == "inconclusive"
    assert 1 <= verdict.runs_needed <= 10
    assert f"needs about {verdict.runs_needed} more runs" in verdict.reason


def test_the_runs_asked_for_mostly_suffice():
    needed = [compare(before, after).runs_needed or 0 for before, after in runs(0.03, 1, count=100)]
    pairs = runs(0.03, 1 + max(needed), count=100, seed=5)
    assert share(pairs, "pass") >= 0.75


def test_a_baseline_too_noisy_for_any_number_of_runs_says_so():
    ((before, after),) = runs(0.30, 3, count=1)
    verdict = compare(before, after)
    assert (verdict.outcome, verdict.runs_needed) == ("inconclusive", None)
    assert "30 runs before" in verdict.reason


def test_the_resolution_is_settable_and_checked():
    ((before, after),) = runs(0.03, 1, count=1)
    assert compare(before, after, resolution=0.3).outcome == "pass"
    limits = SeverityLimits(minor=0.02, moderate=0.3, severe=0.4)
    assert compare(before, after, limits=limits).outcome == "pass"
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="resolution="):
            compare(before, after, resolution=wrong)


def test_one_new_run_like_an_older_outlier_decides_nothing():
    before = (1 + 0.01 * np.random.default_rng(0).standard_normal(30)).tolist()
    assert compare(before, [1.2]).outcome == "regression"
    before[10] = 1.2
    verdict = compare(before, [1.2])
    assert (verdict.outcome, verdict.runs_needed) == ("inconclusive", 2)
    assert compare(before, [1.2, 1.2]).outcome == "regression"
    assert compare(before, [2.0]).outcome == "regression"


def test_one_outlier_among_the_new_runs_decides_nothing():
    before = 1 + 0.01 * np.random.default_rng(0).standard_normal(30)
    assert compare(before, [1.0, 1.5]).outcome == "inconclusive"
    for new in ([1.0, 1.001, 1.5], [0.999, 1.0, 1.001, 1.0, 1.5]):
        assert compare(before, new).outcome == "pass"


def test_the_level_of_new_runs_is_cautious():
    assert new_level(np.array([3.0]), 0.0, 1.0) == 3.0
    assert new_level(np.array([3.0, 9.0]), 0.0, 1.0) == 3.0
    assert new_level(np.array([-3.0, 9.0]), 0.0, 1.0) == 0.0
    assert new_level(np.array([2.0, 3.0, 99.0]), 0.0, 1.0) == pytest.approx(3 + (-1 + 1.5) / 3)


def test_the_baseline_counts_from_its_last_change_on():
    rng = np.random.default_rng(0)
    before = np.concatenate([2 + 0.01 * rng.standard_normal(20), 1 + 0.01 * rng.standard_normal(20)])
    verdict = compare(before, [1.0, 1.005, 0.995])
    assert (verdict.outcome, verdict.baseline_runs) == ("pass", 20)
    assert compare(before, [1.1, 1.105, 1.095]).outcome == "regression"


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_short_baseline_is_inconclusive(count):
    verdict = compare([1.0] * count, [5.0])
    assert verdict.outcome == "inconclusive"
    assert verdict.reason == f"{count} runs before; at least 5 are needed"
    assert not verdict.interval.finite


def test_a_constant_baseline_passes_itself_and_notices_any_change():
    assert compare([2.0] * 10, [2.0]).outcome == "pass"
    assert compare([2.0] * 10, [2.2]).severity == "moderate"
    assert compare([2.0] * 10, [2.0 + 1e-9]).severity is None
    assert compare([-2.0] * 10, [-1.0]).severity == "severe"


def test_a_level_of_zero_is_inconclusive():
    verdict = compare([0.0] * 10, [1.0])
    assert verdict.outcome == "inconclusive"
    assert "the level before is 0" in verdict.reason


@pytest.mark.parametrize(("before", "after", "field"), [([], [1.0], "baseline_runs"), ([1.0], [], "new_runs")])
def test_no_runs_are_refused_by_name(before, after, field):
    with pytest.raises(ValueError, match=f"{field} of 0 values: needs at least 1"):
        compare(before, after)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_run_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match=r"new_runs\[1\]=.*must be finite"):
        compare([1.0] * 10, [1.0, bad])
    with pytest.raises(ValueError, match=r"baseline_runs\[0\]=.*must be finite"):
        compare([bad] * 10, [1.0])


pairs = st.builds(
    lambda seed, new, shift: runs(0.02, new, shift, seed=seed, count=1)[0],
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.sampled_from([-0.2, -0.05, 0.0, 0.05, 0.2]),
)


@settings(max_examples=50, deadline=None)
@given(pairs, st.floats(1e-9, 1e9))
def test_the_unit_does_not_matter(pair, factor):
    here, there = compare(*pair), compare(pair[0] * factor, pair[1] * factor)
    assert (here.outcome, here.severity, here.runs_needed) == (there.outcome, there.severity, there.runs_needed)
    assert there.shift == pytest.approx(here.shift, rel=1e-6, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(pairs)
def test_the_other_direction_turns_a_regression_into_an_improvement(pair):
    mirrored = {"regression": "improvement", "improvement": "regression"}
    lower, higher = compare(*pair), compare(*pair, higher_is_better=True)
    assert mirrored.get(lower.outcome, "none") == (higher.outcome if higher.outcome in mirrored else "none")
    assert (lower.shift, lower.interval) == (higher.shift, higher.interval)
