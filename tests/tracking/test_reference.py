"""A loss holds until it is over or accepted; a gain holds once it has runs enough; noise changes nothing."""

import random

import pytest

from kpt_lightning.tracking.check import check_runs
from kpt_lightning.tracking.reference import reference
from tests.tracking.test_check import runs


def at(*levels: float, noise: float = 0.01, seed: int = 0) -> list[float]:
    drawn = random.Random(seed)
    return [level * (1 + drawn.gauss(0.0, noise)) for level in levels]


def places(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


@pytest.mark.parametrize("before", [8, 30])
@pytest.mark.parametrize("slow", range(1, 11))
def test_a_slow_down_is_red_in_every_run_and_says_since_when(before: int, slow: int) -> None:
    (found,) = check_runs(runs(at(*[1.0] * before, *[1.2] * slow)), accepted=())
    assert found.verdict is not None
    assert (found.verdict.outcome, found.verdict.severity) == ("regression", "severe")
    assert found.base_runs[-1] == str(before - 1)
    assert found.since == ("" if slow == 1 else str(before))


@pytest.mark.parametrize("recovered", range(1, 11))
@pytest.mark.parametrize("slow", [1, 2, 3, 10])
def test_it_is_over_with_the_first_run_that_is_as_before(slow: int, recovered: int) -> None:
    (found,) = check_runs(runs(at(*[1.0] * 20, *[1.2] * slow, *[1.0] * recovered)), accepted=())
    assert not found.regressed
    assert found.judged


def test_what_somebody_accepted_is_the_base_and_a_further_loss_is_red_again() -> None:
    history = runs(at(*[1.0] * 20, *[1.2] * 8))
    accepted = [run.run_id for run in history[-6:]]
    (found,) = check_runs([*history, *runs([1.2], start=90)], accepted=accepted)
    assert found.verdict is not None
    assert (found.verdict.outcome, found.base_runs[0]) == ("pass", "20")
    (found,) = check_runs([*history, *runs([1.4], start=90)], accepted=accepted)
    assert found.regressed


def test_a_gain_that_lasted_and_is_lost_again_is_a_loss() -> None:
    # Whoever wants the old level back accepts it: no history tells a gain that was a mistake from one that was wanted.
    (found,) = check_runs(runs(at(*[1.0] * 20, *[0.8] * 8, *[1.0] * 4)), accepted=())
    assert (found.regressed, found.since) == (True, "28")


def test_a_gain_of_few_runs_that_is_lost_again_is_none() -> None:
    for fast in (1, 2, 3, 4):
        (found,) = check_runs(runs(at(*[1.0] * 20, *[0.8] * fast, *[1.0] * 4)), accepted=())
        assert not found.regressed


def test_losses_too_small_to_name_add_up() -> None:
    levels = [1.0] * 20 + [1.015] * 20 + [1.03] * 20 + [1.045] * 20
    (found,) = check_runs(runs(at(*levels, noise=0.001)), accepted=())
    assert found.verdict is not None
    assert (found.regressed, found.verdict.severity) == (True, "minor")
    assert reference(at(*levels[:40], noise=0.001)).since is None


def test_more_is_better_where_it_is() -> None:
    values = at(*[1.0] * 20, *[0.8] * 5)
    assert reference(values, higher_is_better=True).since == 20
    assert reference(values).since is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ()), ([1.0], (0,)), ([1.0] * 4 + [9.0], places(0, 5)), ([0.0] * 12, places(0, 12)),
        ([5.0] * 20, places(0, 20)),
    ],
)  # fmt: skip
def test_where_nothing_can_be_said_all_runs_are_the_base(values: list[float], expected: tuple[int, ...]) -> None:
    found = reference(values)
    assert (found.places, found.since) == (expected, None)


def test_a_lone_outlier_before_the_new_run_is_part_of_the_base_once_it_is_over() -> None:
    values = at(*[1.0] * 20)
    values[15] = 1.3
    assert reference(values).places == places(0, 20)


def test_a_wrong_number_of_accepted_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="1 entries: must be one of each run, 2"):
        reference([1.0, 1.0], accepted=[True])


def test_stable_histories_raise_no_more_alarms_than_the_gate_alone() -> None:
    alarms = 0
    for seed in range(300):
        (found,) = check_runs(runs(at(*[1.0] * 25, noise=0.03, seed=seed)), accepted=())
        alarms += found.regressed
    assert alarms <= 4
