"""The statistics of paired timings on simulated programs: how often noise wins, and what is predicted."""

import math
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import pytest
import torch

from kpt_lightning.measure import interleave
from kpt_lightning.measure.interleave import ROUNDS, SLOW_ROUNDS, Gain, gain_of, measure_gain
from kpt_lightning.optimize.trial import judge_gain

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Of the time of a visit, on the logarithm.

    Attributes:
        sigma: Standard deviation.
        memory: Correlation from one visit to the next, AR(1).
        drift: Growth from one visit to the next.
        outliers: Share of visits that take longer, by ten sigmas on average.
    """

    sigma: float = 0.02
    memory: float = 0.0
    drift: float = 0.0
    outliers: float = 0.0


NOISES = {
    "independent": Noise(),
    "AR(1)": Noise(memory=0.7),
    "strong AR(1)": Noise(memory=0.95),
    "drift": Noise(drift=0.01),
    "outliers": Noise(outliers=0.1),
    "all of it": Noise(memory=0.7, drift=0.01, outliers=0.1),
    "quiet": Noise(sigma=0.004),
    "loud": Noise(sigma=0.1),
}


def trial(rng: random.Random, noise: Noise, *, speed: float = 1.0, rounds: int = ROUNDS) -> Gain:
    """One simulated trial: visits in the order in which they are made."""
    fresh, state = noise.sigma * math.sqrt(1 - noise.memory**2), noise.sigma * rng.gauss(0, 1)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            log = state + noise.drift * (len(times[0]) + len(times[1]))
            if noise.outliers and rng.random() < noise.outliers:
                log += rng.expovariate(1 / (10 * noise.sigma))
            times[which].append(math.exp(log) / (speed if which else 1.0))
            state = noise.memory * state + fresh * rng.gauss(0, 1)
    return gain_of([math.log(a / b) for a, b in zip(*times, strict=True)], times)


def share_kept(trials: int, noise: Noise, *, speed: float = 1.0, rounds: int = ROUNDS) -> float:
    rng = random.Random(repr((noise, speed, rounds)))
    return sum(judge_gain(trial(rng, noise, speed=speed, rounds=rounds))[0] for _ in range(trials)) / trials


def test_of_100_000_changes_that_do_nothing_less_than_two_in_a_hundred_are_kept() -> None:
    assert share_kept(100_000, NOISES["independent"]) < 0.01


@pytest.mark.parametrize("rounds", [ROUNDS, SLOW_ROUNDS])
@pytest.mark.parametrize("name", NOISES)
def test_no_kind_of_noise_makes_a_change_that_does_nothing_win(name: str, rounds: int) -> None:
    assert share_kept(10_000, NOISES[name], rounds=rounds) < 0.02


@pytest.mark.parametrize("speed", [0.9, 0.97, 0.99])
def test_a_change_that_is_slower_is_never_kept(speed: float) -> None:
    assert share_kept(5_000, Noise(), speed=speed) < 0.004


def test_five_per_cent_are_found_where_rounds_scatter_by_two() -> None:
    # A round compares two visits.
    scatter = Noise(sigma=0.02 / math.sqrt(2))
    assert share_kept(5_000, scatter, speed=1.05) > 0.99
    assert share_kept(5_000, scatter, speed=1.05, rounds=SLOW_ROUNDS) > 0.93
    assert share_kept(5_000, Noise(sigma=0.02), speed=1.05) > 0.9


def test_a_gain_below_half_a_per_cent_is_not_worth_a_change() -> None:
    assert share_kept(2_000, Noise(sigma=1e-4), speed=1.004) == 0.0
    assert share_kept(2_000, Noise(sigma=1e-4), speed=1.006) == 1.0


def share_predicted(noise: Noise, *, moved: float, rounds: int) -> float:
    """How often a second trial falls where the first expected it; ``moved`` is the shift of the sessions' ratio."""
    rng, trials, inside = random.Random(repr((noise, moved, rounds))), 4_000, 0
    for _ in range(trials):
        first = trial(rng, noise, speed=1.1, rounds=rounds)
        second = trial(rng, noise, speed=1.1 * math.exp(moved * rng.gauss(0, 1)), rounds=rounds)
        inside += first.expect_low <= second.ratio <= first.expect_high
    return inside / trials


@pytest.mark.parametrize("rounds", [ROUNDS, SLOW_ROUNDS])
@pytest.mark.parametrize("name", ["independent", "AR(1)", "drift", "outliers", "all of it"])
def test_a_second_measurement_falls_where_the_first_expects_it(name: str, rounds: int) -> None:
    noise = NOISES[name]
    # Between sessions the ratio moves as much as a round scatters within one.
    scatter = noise.sigma * math.sqrt(2 * (1 - noise.memory))
    assert share_predicted(noise, moved=scatter, rounds=rounds) > 0.9
    assert share_predicted(noise, moved=0.0, rounds=rounds) > 0.95


def test_the_expectation_is_no_wider_than_the_noise_asks_for() -> None:
    rng = random.Random(1)
    widths = sorted(math.log(g.expect_high / g.expect_low) / 2 for g in (trial(rng, Noise()) for _ in range(1_000)))
    scatter = 0.02 * math.sqrt(2)
    assert 2 * scatter < widths[500] < 3.5 * scatter


@pytest.mark.parametrize("speed", [0.5, 1.0, 1.25, 3.0])
def test_without_noise_the_figures_are_exact(speed: float) -> None:
    gain = trial(random.Random(0), Noise(sigma=0.0), speed=speed)
    for value in (gain.ratio, gain.low, gain.high, gain.expect_low, gain.expect_high):
        assert value == pytest.approx(speed)
    assert (gain.before, gain.after, gain.rounds) == (1.0, pytest.approx(1 / speed), ROUNDS)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_few_rounds_expect_nothing(rounds: int) -> None:
    gain = trial(random.Random(0), Noise(), rounds=rounds)
    assert (gain.low, gain.high, gain.expect_low, gain.expect_high) == (0.0, math.inf, 0.0, math.inf)
    assert not judge_gain(gain)[0]


@pytest.mark.parametrize("rounds", [4, 5])
def test_fewer_than_six_rounds_bound_nothing_and_are_not_kept(rounds: int) -> None:
    gain = trial(random.Random(0), Noise(), speed=2.0, rounds=rounds)
    assert (gain.low, gain.high) == (0.0, math.inf)
    assert gain.expect_low > 1.5
    assert not judge_gain(gain)[0]


@dataclass
class Program:
    """A program with a clock of its own, in the place of the machine's."""

    costs: tuple[float, float]
    slower: float = 0.0
    now: float = 100.0
    state: int | None = None
    visits: list[int] = field(default_factory=list)
    runs: list[int | None] = field(default_factory=list)

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def enter(self, state: int) -> AbstractContextManager[None]:
        @contextmanager
        def inside() -> Iterator[None]:
            assert self.state is None
            self.state = state
            self.visits.append(state)
            try:
                yield
            finally:
                self.state = None

        return inside()

    def run(self) -> None:
        assert self.state is not None
        self.runs.append(self.state)
        self.now += self.costs[self.state] * (1 + self.slower * len(self.runs))

    def measure(self, **options: float) -> Gain:
        return measure_gain(lambda: self.enter(0), lambda: self.enter(1), self.run, device=CPU, **options)  # type: ignore[arg-type]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    made = Program((0.2, 0.1))
    monkeypatch.setattr(interleave, "time", made)
    return made


def test_states_are_visited_in_turns_and_the_order_turns_round(program: Program) -> None:
    gain = program.measure(rounds=4)
    # One visit to each tells how many steps a visit has.
    assert program.visits == [0, 1, 0, 1, 1, 0, 0, 1, 1, 0]
    assert gain.ratio == pytest.approx(2.0)
    assert (gain.before, gain.after) == (pytest.approx(0.2), pytest.approx(0.1))


def test_each_visit_warms_up_first_and_lasts_a_while(program: Program) -> None:
    program.costs = (0.02, 0.01)
    program.measure(rounds=1)
    # Two to size each visit; then one to warm up, and enough for a twentieth of a second.
    assert program.runs == [0, 0, 1, 1] + [0] * (1 + 3) + [1] * (1 + 5)


def test_a_steady_slowdown_of_the_machine_falls_on_both_states(program: Program) -> None:
    program.slower = 0.01
    gain = program.measure(rounds=ROUNDS)
    assert gain.low < 2.0 < gain.high
    # An odd number of rounds has one more of one order.
    assert gain.ratio == pytest.approx(2.0, rel=0.02)
    assert program.measure(rounds=ROUNDS - 1).ratio == pytest.approx(2.0, rel=0.001)


def test_a_state_that_lost_four_rounds_is_given_up(program: Program) -> None:
    program.costs = (0.1, 0.2)
    gain = program.measure(rounds=ROUNDS)
    assert gain.rounds == 4
    assert judge_gain(gain) == (False, "slower in each of 4 rounds")


def test_time_that_is_out_stops_after_the_round_that_runs(program: Program) -> None:
    assert program.measure(rounds=ROUNDS, deadline=0.0).rounds == 1
    program.now = 100.0
    assert 1 < program.measure(rounds=ROUNDS, deadline=102.0).rounds < ROUNDS


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_step_leaves_the_state(program: Program, error: type[BaseException]) -> None:
    def fails() -> None:
        if len(program.runs) == 8:
            raise error
        program.run()

    with pytest.raises(error):
        measure_gain(lambda: program.enter(0), lambda: program.enter(1), fails, device=CPU)
    assert program.state is None


def test_rounds_of_an_earlier_measurement_count_too() -> None:
    visits = []
    first = measure_gain(nullcontext, nullcontext, lambda: visits.append(1), device=CPU, rounds=3, give_up=False)
    both = measure_gain(
        nullcontext, nullcontext, lambda: visits.append(1), device=CPU, rounds=4, give_up=False, earlier=first
    )
    assert (first.rounds, both.rounds) == (3, 7)
    assert both.ratios[:3] == first.ratios
    assert both == gain_of(both.ratios, both.times)
    assert [len(times) for times in both.times] == [7, 7]
