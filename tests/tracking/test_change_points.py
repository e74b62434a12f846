import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_lightning.tracking.change_points import detect_changes, relative_shift
from kpt_lightning.tracking.severity import SeverityLimits
from kpt_lightning.tracking.thresholds import critical_evidence, critical_rank

SERIES = 200


def noise(kind, n, seed=0, count=SERIES):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count, n))
    if kind == "skewed":
        return (np.exp(0.5 * values) - math.exp(0.125)) / 0.604
    if kind == "outliers":
        return np.where(rng.random((count, n)) < 0.05, values + 10 * rng.choice([-1.0, 1.0], (count, n)), values)
    if kind == "autoregressive":
        for place in range(1, n):
            values[:, place] = 0.5 * values[:, place - 1] + math.sqrt(0.75) * values[:, place]
    return values


def with_step(values, shift, seed=1):
    count, n = values.shape
    index = np.random.default_rng(seed).integers(math.ceil(0.3 * n), int(0.7 * n) + 1, count)
    return values + shift * (np.arange(n) >= index[:, None]), index


def flagged(series):
    return sum(bool(detect_changes(values)) for values in series) / len(series)


def recall_and_precision(series, truth):
    found = [[change.index for change in detect_changes(values)] for values in series]
    hits = sum(any(abs(place - index) <= 2 for place in places) for places, index in zip(found, truth, strict=True))
    return hits / len(series), hits / max(sum(map(len, found)), 1)


@pytest.mark.parametrize("n", [10, 20, 30, 50])
@pytest.mark.parametrize(
    ("kind", "most"), [("normal", 0.01), ("skewed", 0.02), ("outliers", 0.02), ("autoregressive", 0.05)]
)
def test_unchanged_histories_are_rarely_flagged(kind, most, n):
    assert flagged(1 + 0.03 * noise(kind, n)) <= most


@pytest.mark.parametrize(("kind", "most"), [("normal", 0.05), ("outliers", 0.05), ("autoregressive", 0.10)])
def test_forty_looks_at_a_growing_unchanged_history_stay_quiet(kind, most):
    series = 1 + 0.03 * noise(kind, 60, seed=2, count=100)
    alarms = sum(any(detect_changes(values[:n]) for n in range(21, 61)) for values in series)
    assert alarms / len(series) <= most


@pytest.mark.parametrize(
    ("kind", "variation", "shift", "least"),
    [
        ("normal", 0.01, 0.02, 0.80),
        ("normal", 0.01, 0.05, 0.99),
        ("normal", 0.03, 0.05, 0.58),
        ("normal", 0.03, 0.10, 0.98),
        ("normal", 0.10, 0.20, 0.70),
        ("outliers", 0.03, 0.05, 0.38),
        ("outliers", 0.03, 0.10, 0.90),
        ("outliers", 0.03, 0.20, 0.98),
        ("autoregressive", 0.03, 0.10, 0.78),
    ],
)
def test_a_step_in_thirty_runs_is_found_where_it_is(kind, variation, shift, least):
    recall, precision = recall_and_precision(*with_step(1 + variation * noise(kind, 30), shift))
    assert recall >= least
    assert precision >= (0.98 if recall >= 0.95 else 0.90)


def test_the_interval_holds_the_true_shift():
    series, truth = with_step(1 + 0.01 * noise("normal", 40), 0.05)
    changes = [found[0] for values, index in zip(series, truth, strict=True) if (found := detect_changes(values))]
    inside = sum(change.interval.low <= 0.05 <= change.interval.high for change in changes)
    assert len(changes) >= 0.98 * SERIES
    assert inside / len(changes) >= 0.93


def test_most_confidence_goes_with_a_right_place():
    series, truth = with_step(1 + 0.03 * noise("normal", 30), 0.05)
    found = [(one, index) for values, index in zip(series, truth, strict=True) for one in detect_changes(values)]
    right = sum(abs(change.index - index) <= 2 for change, index in found) / len(found)
    said = sum(change.confidence for change, _ in found) / len(found)
    assert all(0.75 < change.confidence <= 1 for change, _ in found)
    assert right == pytest.approx(said, abs=0.06)


def test_the_range_of_places_holds_the_true_one():
    series, truth = with_step(1 + 0.03 * noise("normal", 30), 0.06)
    found = [(one, index) for values, index in zip(series, truth, strict=True) for one in detect_changes(values)]
    assert all(change.first <= change.index <= change.last for change, _ in found)
    assert sum(change.first <= index <= change.last for change, index in found) / len(found) >= 0.92


def test_the_range_of_places_counts_from_the_start_of_the_history():
    values = 1 + 0.01 * noise("normal", 300, count=1)[0]
    values[200:] += 0.2
    (change,) = detect_changes(values)
    assert (change.first, change.index, change.last) == (200, 200, 200)


@pytest.mark.parametrize(
    ("shift", "severity"), [(0.001, None), (0.03, "minor"), (0.10, "moderate"), (0.30, "severe"), (-0.1, "improvement")]
)
def test_severity_follows_the_loss_that_is_certain(shift, severity):
    values = 1 + 0.0001 * noise("normal", 30)[0]
    values[15:] += shift
    (change,) = detect_changes(values)
    assert (change.index, change.severity) == (15, severity)
    assert change.shift == pytest.approx(shift, abs=2e-4)


def test_severity_uses_the_lower_end_and_not_the_estimate():
    values = 1 + 0.03 * noise("normal", 30)[0]
    values[15:] += 0.16
    (change,) = detect_changes(values)
    assert change.shift > 0.15 > change.interval.low
    assert change.severity == "moderate"


def test_limits_are_settable_and_checked():
    values = [1.0] * 10 + [1.01] * 10
    assert detect_changes(values)[0].severity is None
    assert (
        detect_changes(values, limits=SeverityLimits(minor=0.001, moderate=0.002, severe=0.005))[0].severity == "severe"
    )
    for wrong in ({"minor": 0.0}, {"minor": 0.06}, {"severe": math.nan}, {"severe": math.inf}):
        with pytest.raises(ValueError, match="limits="):
            SeverityLimits(**wrong)


def test_a_drop_of_a_throughput_is_a_loss():
    values = [100.0, 101.0, 99.0, 100.5] * 4 + [80.0, 81.0, 79.0, 80.5] * 4
    assert detect_changes(values, higher_is_better=True)[0].severity == "severe"
    assert detect_changes(values)[0].severity == "improvement"


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 7, [1.0] * 50, [0.0] * 50, [-3.0] * 20, [1, 1, 1, 1, 2, 2, 2]])
def test_nothing_is_found_in_too_few_or_equal_values(values):
    assert detect_changes(values) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match=r"values\[3\]=.*must be finite"):
        detect_changes([1.0, 1.0, 1.0, bad, 1.0])


def test_values_of_two_metrics_at_once_are_refused():
    with pytest.raises(ValueError, match=r"values of shape \(2, 2\): must be one row"):
        detect_changes([[1.0, 2.0], [3.0, 4.0]])


def test_equal_values_with_one_step_are_found_exactly():
    (change,) = detect_changes([2.0] * 12 + [3.0] * 9)
    assert (change.index, change.shift, change.severity) == (12, 0.5, "severe")
    assert (change.interval.low, change.interval.high) == (0.5, 0.5)


def test_negative_values_shift_relative_to_their_size():
    (change,) = detect_changes([-2.0] * 12 + [-1.0] * 9)
    assert (change.index, change.shift, change.severity) == (12, 0.5, "severe")


def test_a_level_of_zero_has_no_relative_shift():
    (change,) = detect_changes([0.0] * 12 + [1.0] * 9)
    assert change.shift == math.inf
    assert change.interval.reason == "the old level is 0"
    assert change.severity is None


extremes = st.one_of(
    st.sampled_from([0.0, 5e-324, 1e-300, 1.0, 1e300, 1e308]), st.floats(-323.0, 308.0).map(lambda power: 10.0**power)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(extremes, min_size=8, max_size=40))
def test_the_smallest_and_the_largest_numbers_in_one_history_are_judged_without_a_warning(values):
    for change in detect_changes(values):
        assert change.first <= change.index <= change.last
        assert not math.isnan(change.shift)


def test_a_step_of_tiny_values_is_found_beside_one_huge_value():
    values = 1e-100 * (1 + 0.01 * noise("normal", 30, count=1)[0])
    values[15:] *= 1.2
    values[7] = 1e150
    assert [change.index for change in detect_changes(values)] == [15]


@pytest.mark.parametrize("after", [3, 4, 5])
def test_a_clear_step_is_found_three_runs_from_either_end(after):
    values = 1 + 0.01 * noise("normal", 30)[0]
    values[30 - after :] += 0.15
    assert [change.index for change in detect_changes(values)] == [30 - after]
    assert [change.index for change in detect_changes(values[::-1])] == [after]


@pytest.mark.parametrize(("n", "sigmas", "least"), [(8, 10.0, 0.9), (12, 6.0, 0.7), (12, 100.0, 1.0), (15, 6.0, 0.85)])
def test_a_clear_step_is_found_in_a_short_history(n, sigmas, least):
    values = 100 + noise("normal", n)
    values[:, n // 2 :] += sigmas
    assert flagged(values) >= least


@pytest.mark.parametrize("after", [1, 2])
def test_one_or_two_runs_are_not_a_level(after):
    values = 1 + 0.01 * noise("normal", 30)[0]
    values[30 - after :] += 0.15
    assert detect_changes(values) == []


def test_a_level_that_came_and_went_is_two_changes():
    values = 1 + 0.01 * noise("normal", 60)[0]
    values[30:40] += 0.1
    first, second = detect_changes(values)
    assert (first.index, second.index) == (30, 40)
    assert first.severity == "moderate"
    assert second.severity == "improvement"


def test_changes_of_a_long_history_are_found_in_order():
    values = 1 + 0.01 * noise("normal", 2000, count=1)[0]
    truth = [250, 600, 615, 1400]
    for sign, place in zip((1, 1, -1, 1), truth, strict=True):
        values[place:] += sign * 0.1
    assert [change.index for change in detect_changes(values)] == pytest.approx(truth, abs=1)


def test_a_long_unchanged_history_has_no_change():
    assert flagged(1 + 0.03 * noise("normal", 2000, count=50)) <= 0.04


def test_the_bar_rises_with_the_number_of_looks():
    assert critical_rank(60, looks=200) > critical_rank(60, looks=10) > critical_rank(60) > critical_rank(30)
    assert critical_evidence(30, looks=10) == pytest.approx(critical_evidence(30) + math.log(10))


def test_an_autocorrelated_history_widens_the_interval():
    independent = np.array([1.0, -1.0, -1.0, 1.0] * 10) * 0.01 + 1
    clustered = np.array([1.0] * 5 + [-1.0] * 5).repeat(1).tolist() * 4
    _, narrow = relative_shift(independent, 20)
    _, wide = relative_shift(np.array(clustered) * 0.01 + 1, 20)
    assert wide.half_width > 1.5 * narrow.half_width


histories = st.integers(0, 2**32 - 1).map(
    lambda seed: with_step(1 + 0.02 * noise("outliers", 40, seed=seed, count=1), 0.08, seed=seed)[0][0]
)


@settings(max_examples=50, deadline=None)
@given(histories, st.floats(1e-9, 1e9))
def test_the_unit_does_not_matter(values, factor):
    here, there = detect_changes(values), detect_changes(values * factor)
    assert [change.index for change in here] == [change.index for change in there]
    assert [change.severity for change in here] == [change.severity for change in there]
    assert [change.shift for change in there] == pytest.approx([change.shift for change in here], rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(histories, st.sampled_from([2.0**-1000, 2.0**-60, 2.0, 2.0**1000]))
def test_a_power_of_two_changes_no_digit(values, factor):
    assert detect_changes(values) == detect_changes(values * factor)


@settings(max_examples=50, deadline=None)
@given(histories)
def test_the_other_direction_turns_losses_into_improvements(values):
    for lower, higher in zip(detect_changes(values), detect_changes(values, higher_is_better=True), strict=True):
        assert (lower.index, lower.shift, lower.interval) == (higher.index, higher.shift, higher.interval)
        assert (lower.severity in ("minor", "moderate", "severe")) <= (higher.severity == "improvement")
        assert (higher.severity in ("minor", "moderate", "severe")) <= (lower.severity == "improvement")


def test_equal_histories_give_equal_results():
    values = with_step(1 + 0.02 * noise("normal", 40), 0.05)[0]
    assert [detect_changes(row) for row in values] == [detect_changes(row.tolist()) for row in values]
