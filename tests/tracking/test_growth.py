"""What grew to stay is found, and what only passes by or fills up is not."""

import numpy as np
import pytest

from kpt_lightning.tracking.growth import lasting_growth, steady_growth


def noisy(levels, cv=0.01, seed=0):
    return np.asarray(levels) * (1 + cv * np.random.default_rng(seed).standard_normal(len(levels)))


@pytest.mark.parametrize(("before", "after"), [(5, 3), (40, 3), (20, 60)])
def test_a_step_up_is_found_at_its_place_with_a_cautious_size(before, after):
    found = lasting_growth(noisy([1.0] * before + [1.3] * after), looks=1)
    assert found.index == before
    assert found.relative == pytest.approx(0.3, abs=0.03)
    assert 0.03 <= found.at_least < found.relative
    assert not found.steady


@pytest.mark.parametrize(
    "levels",
    [
        [1.0] * 60,
        [1.3] * 20 + [1.0] * 20,
        [1.0] * 20 + [1.01] * 20,
        [1.0] * 20 + [1.5] * 2,
        [1.0] * 20 + [9.0] + [1.0] * 20,
        [1.0] * 4 + [1.3] * 3,
    ],
    ids=["none", "a fall", "too small", "too short", "one wild block", "too few"],
)
def test_what_is_no_lasting_growth_is_left_alone(levels):
    assert lasting_growth(noisy(levels), looks=1) is None


def test_one_wild_block_does_not_hide_a_growth():
    assert lasting_growth(noisy([1.0] * 10 + [50.0] + [1.0] * 20 + [1.2] * 8), looks=1).index == 31


def test_more_looks_ask_for_more_evidence():
    values = noisy([1.0] * 6 + [1.12] * 4, cv=0.005)
    assert lasting_growth(values, looks=1) is not None
    assert lasting_growth(values, looks=10**9) is None


def test_equal_blocks_and_an_exact_step_need_no_noise():
    assert lasting_growth(np.ones(30), looks=1) is None
    assert lasting_growth(np.array([1.0] * 20 + [1.1] * 10), looks=1).at_least == pytest.approx(0.1)


@pytest.mark.parametrize("noise", [0.0, 0.001])
def test_a_steady_rise_is_a_leak(noise):
    found = steady_growth(noisy(np.linspace(1e9, 1.5e9, 40), cv=noise))
    assert found.relative == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    "values",
    [
        np.full(40, 1e9),
        1e9 * (1.5 - 0.5 * np.exp(-np.arange(60) / 8)),
        np.array([1e9] * 20 + [2e9] * 20),
        1e9 + 1e5 * np.arange(40.0),
        np.linspace(1e9, 2e9, 12),
        np.full(40, np.nan),
    ],
    ids=["constant", "fills up", "one jump", "too small", "too few", "unknown"],
)
def test_what_is_no_steady_rise_is_no_leak(values):
    assert steady_growth(values) is None


def test_a_memory_that_wanders_is_rarely_called_a_leak():
    rng = np.random.default_rng(0)
    walks = 1e9 + np.cumsum(rng.standard_normal((2000, 64)) * 1e7, axis=1)
    assert sum(steady_growth(walk) is not None for walk in walks) <= 2
