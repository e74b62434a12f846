import numpy as np
import pytest

from kpt_lightning.tracking.noise import standardised
from kpt_lightning.tracking.step_evidence import AUTOCORRELATIONS, STEP_VARIANCES, step_over_memory

SERIES = 400


def with_memory(rho, n, seed=0):
    values = np.random.default_rng(seed).standard_normal((SERIES, n))
    for place in range(1, n):
        values[:, place] = rho * values[:, place - 1] + np.sqrt(1 - rho**2) * values[:, place]
    return values


def evidence(rows):
    return step_over_memory(standardised(rows))


@pytest.mark.parametrize("priors", [AUTOCORRELATIONS, STEP_VARIANCES])
def test_prior_probabilities_add_up_to_one(priors):
    assert sum(priors.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("n", [8, 15, 30, 60])
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5, 0.9])
def test_noise_with_any_memory_seldom_looks_like_a_step(rho, n):
    found = evidence(with_memory(rho, n))
    # By Markov's inequality a Bayes factor of 10 has a chance of one in ten at most; averaged priors, so some room.
    assert (found > np.log(10)).mean() <= 0.05
    assert np.median(found) < 0.0


@pytest.mark.parametrize(("rho", "height", "least"), [(0.0, 3.0, 0.95), (0.5, 4.0, 0.9)])
def test_a_step_is_seen_in_noise_with_and_without_memory(rho, height, least):
    rows = with_memory(rho, 30)
    rows[:, 15:] += height
    assert (evidence(rows) > 0.0).mean() >= least


@pytest.mark.parametrize("n", [8, 12, 30])
def test_levels_without_noise_are_overwhelming_evidence_in_the_shortest_history(n):
    rows = np.ones((1, n))
    rows[:, n // 2 :] = 2.0
    assert evidence(rows)[0] > 20.0


def test_rows_are_judged_one_by_one():
    rows = with_memory(0.3, 20)[:10]
    assert evidence(rows) == pytest.approx(np.concatenate([evidence(row[None]) for row in rows]))


def test_direction_of_value_and_size_do_not_matter():
    rows = with_memory(0.3, 20)[:10]
    assert evidence(-5e200 * rows) == pytest.approx(evidence(rows))
