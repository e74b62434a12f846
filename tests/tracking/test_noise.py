import numpy as np
import pytest

from kpt_lightning.tracking.noise import scale_around, standardised, winsorised, without_lone_values


def step_with_outlier(at, value):
    rows = np.random.default_rng(0).standard_normal((1, 30))
    rows[:, 15:] += 4.0
    rows[0, at] = value
    return rows, np.array([15])


@pytest.mark.parametrize(("at", "level"), [(0, 0.0), (7, 0.0), (22, 4.0), (29, 4.0)])
@pytest.mark.parametrize("value", [-40.0, 60.0])
def test_a_certain_outlier_becomes_what_its_neighbours_say(at, level, value):
    rows, index = step_with_outlier(at, value)
    assert winsorised(rows, index)[0, at] == pytest.approx(level, abs=1.5)


def test_an_outlier_beside_the_step_takes_no_side():
    rows, index = step_with_outlier(14, 60.0)
    assert 0.5 < winsorised(rows, index)[0, 14] < 3.5


def test_a_value_beside_a_step_far_larger_than_the_noise_stays_on_its_side():
    rows = np.random.default_rng(0).standard_normal((500, 12))
    rows[:, 6:] += 100.0
    calm = winsorised(rows, np.full(500, 6))
    assert calm[:, :6].max() < 10.0
    assert calm[:, 6:].min() > 90.0


def test_ordinary_values_stay():
    rows, index = step_with_outlier(7, 60.0)
    kept = np.arange(30) != 7
    for calm in (winsorised(rows, index), without_lone_values(rows, index)):
        assert (np.abs(calm - rows) < 0.6)[0, kept].all()


def test_four_in_a_row_are_no_lone_values():
    rows = np.random.default_rng(0).standard_normal((1, 30))
    rows[0, 10:14] = 60.0
    index = np.array([15])
    assert (without_lone_values(rows, index)[0, 10:14] == 60.0).all()
    assert (winsorised(rows, index)[0, 10:14] > 2.0).all()


@pytest.mark.parametrize("factor", [1e-250, 1e-160, 1.0, 1e160, 1e250])
def test_the_scale_of_tiny_and_huge_values_is_found(factor):
    rows = np.random.default_rng(0).standard_normal((3, 50))
    assert scale_around(factor * rows, 1) == pytest.approx(factor * scale_around(rows, 1))


def test_one_huge_value_leaves_the_scale_of_the_tiny_ones():
    rows = 1e-200 * np.random.default_rng(0).standard_normal((1, 50))
    usual = scale_around(rows, 1)
    rows[0, 3] = 1e300
    assert usual < scale_around(rows, 1) < 1.5 * usual


def test_standardised_rows_have_no_mean_and_a_largest_value_of_one():
    rows = 1e-200 * np.random.default_rng(0).standard_normal((3, 50))
    found = standardised(rows)
    assert np.abs(found).max(axis=1) == pytest.approx(1.0)
    assert found.mean(axis=1) == pytest.approx(0.0, abs=1e-12)


def test_a_constant_row_is_zero():
    assert not standardised(np.full((2, 5), 7.0)).any()
