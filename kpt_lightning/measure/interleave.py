"""Two states of one program, timed in turns: what drifts with time falls on both.

Each round times both states next to each other, the order turning round from one to the next, and gives one log ratio.
The median over rounds with its distribution-free interval (``statistics.median_interval``) is the gain.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from kpt_lightning.measure.statistics import (
    MEDIAN_EFFICIENCY,
    median,
    median_interval,
    robust_sigma,
    t_quantile,
)

ROUNDS = 11
"""The median of 11 lies inside their 2nd to 10th value with 98.8 %, so an equal state wins in 1 of 170 trials."""

SLOW_ROUNDS, SLOW_SECONDS = 7, 0.1
"""Of steps that take long fewer rounds: the median of 7 lies between the ends with 98.4 %."""

_LEAST_SECONDS = 0.05
"""A visit to a state lasts at least this long: a clock tick, a scheduler's turn and a cold cache are then small."""

_HOPELESS = 4
"""After this many rounds that were all lost, the rest is not run. Stopping for a loss makes no false win."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """How much faster the second state is.

    Attributes:
        ratio: Time of the first over time of the second: above 1 is faster.
        low: Lower end of the interval of the median.
        high: Upper end of it.
        expect_low: Lower end of where a measurement repeated later will fall.
        expect_high: Upper end of it.
        rounds: How many were run.
        before: Median time of a step in the first state, in seconds.
        after: Median time in the second.
        ratios: Logarithm of the first time over the second in each round.
        times: Seconds of a step in both states, round by round.
    """

    ratio: float
    low: float
    high: float
    expect_low: float
    expect_high: float
    rounds: int
    before: float
    after: float
    ratios: tuple[float, ...] = ()
    times: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())


State = Callable[[], AbstractContextManager[object]]


def measure_gain(
    first: State,
    second: State,
    run: Callable[[], object],
    *,
    device: torch.device,
    rounds: int = ROUNDS,
    deadline: float | None = None,
    give_up: bool = True,
    earlier: Gain | None = None,
) -> Gain:
    """Time ``run`` in both states, in turns.

    Args:
        first: Puts the program into the first state while its context is entered.
        second: Likewise.
        run: One step.
        device: CUDA is waited for before and after each visit.
        rounds: How many pairs.
        give_up: Stop after a few rounds that were all lost: enough for a refusal, too few for a figure.
        deadline: Value of ``time.monotonic()`` at which to stop; at least one round is run.
        earlier: A measurement of the same states, whose rounds are counted too.
    """
    ratios = [] if earlier is None else list(earlier.ratios)
    times: tuple[list[float], list[float]] = ([], []) if earlier is None else tuple(map(list, earlier.times))  # type: ignore[assignment]
    steps = _steps_a_visit(first, run, device), _steps_a_visit(second, run, device)
    for number in range(rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        seconds = {which: _visit((first, second)[which], run, device, steps[which]) for which in order}
        for which in order:
            times[which].append(seconds[which])
        ratios.append(math.log(seconds[0] / seconds[1]))
        lost = give_up and number + 1 >= _HOPELESS and max(ratios) < 0
        if lost or (deadline is not None and time.monotonic() > deadline):
            break
    return gain_of(ratios, times)


def gain_of(ratios: Sequence[float], times: tuple[Sequence[float], Sequence[float]]) -> Gain:
    """The gain that rounds show.

    Args:
        ratios: Logarithm of the first time over the second, one of each round.
        times: Of a step in both states, in seconds.
    """
    center = median(ratios) or 0.0
    interval = median_interval(ratios)
    width = _width(ratios)
    return Gain(
        ratio=math.exp(center), low=math.exp(interval.low), high=_exp(interval.high),
        expect_low=math.exp(center - width), expect_high=_exp(center + width), rounds=len(ratios),
        before=median(times[0]) or 0.0, after=median(times[1]) or 0.0,
        ratios=tuple(ratios), times=(tuple(times[0]), tuple(times[1])),
    )  # fmt: skip


def _width(ratios: Sequence[float]) -> float:
    """Within which the median of as many rounds, run in another session, falls in at least 9 of 10 cases.

    With ``s`` the robust spread of a round, each of both medians scatters by ``s sqrt(pi / 2 / n)``. Another session
    meets another state of the machine, other clocks, addresses and neighbours. How far that moves the median one
    session cannot tell: as far as ``s`` is assumed. What moved from the first to the second half comes on top.
    """
    n, spread = len(ratios), robust_sigma(ratios)
    if n < 4 or spread is None:
        return math.inf
    halves = [median(part) or 0.0 for part in (ratios[: n // 2], ratios[n // 2 :])]
    scatter = spread * math.sqrt(1 + 2 * MEDIAN_EFFICIENCY**2 / n)
    return _t_95(n - 1) * scatter + abs(halves[0] - halves[1])


@functools.cache
def _t_95(degrees: int) -> float:
    return t_quantile(0.975, degrees)


def _steps_a_visit(state: State, run: Callable[[], object], device: torch.device) -> int:
    with state():
        run()
        return max(1, math.ceil(_LEAST_SECONDS / max(timed(run, device), 1e-6)))


def _visit(state: State, run: Callable[[], object], device: torch.device, steps: int) -> float:
    """The median time of a step in one state, after one that warms it up."""
    with state():
        run()
        return median([timed(run, device) for _ in range(steps)]) or 0.0


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the work that it leaves to a GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _exp(value: float) -> float:
    return math.inf if value == math.inf else math.exp(value)
