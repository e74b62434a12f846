import numpy as np
import pytest

from kpt_lightning.tracking.noise import standardised
from kpt_lightning.tracking.step_place import step_place

SERIES, RUNS = 1000, 30


def places_and_truth(height, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, RUNS - 2, SERIES)
    rows = rng.standard_normal((SERIES, RUNS)) + height * (np.arange(RUNS) >= truth[:, None])
    return step_place(standardised(rows)), truth


@pytest.mark.parametrize("height", [2.0, 3.0, 5.0])
def test_the_range_holds_the_true_place_as_often_as_it_says(height):
    places, truth = places_and_truth(height)
    assert ((places.first <= truth) & (truth <= places.last)).mean() >= 0.93


def test_the_range_holds_the_place_that_is_reported():
    places, _ = places_and_truth(1.0)
    assert (places.first <= places.index).all()
    assert (places.index <= places.last).all()


def test_a_clearer_step_has_a_shorter_range():
    lengths = [np.mean(places.last - places.first) for places, _ in map(places_and_truth, (1.5, 2.5, 5.0))]
    assert lengths[0] > lengths[1] > lengths[2]
    assert lengths[2] < 1.0


@pytest.mark.parametrize("place", [3, 10, 27])
def test_a_step_without_noise_has_one_place(place):
    rows = np.where(np.arange(RUNS) >= place, 2.0, 1.0)[None]
    found = step_place(standardised(rows))
    assert (found.index[0], found.first[0], found.last[0]) == (place, place, place)
    assert found.mass[0] == pytest.approx(1.0)


def test_the_mass_is_the_share_of_right_places():
    places, truth = places_and_truth(2.0)
    right = np.abs(places.index - truth) <= 2
    assert right.mean() == pytest.approx(places.mass.mean(), abs=0.04)
