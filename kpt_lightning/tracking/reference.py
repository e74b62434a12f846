"""Which earlier runs a new one is judged by: those at the level that holds, not those of a loss that nobody accepted.

If a slower level became the base as soon as it is the usual one, a build would be red once and green ever after. So the
level before a lasting loss holds until somebody accepts the new one, or the runs are back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kpt_lightning.measure import statistics
from kpt_lightning.tracking.change_points import detect_changes, relative_shift
from kpt_lightning.tracking.gate import compare
from kpt_lightning.tracking.noise import Array, checked, in_range
from kpt_lightning.tracking.severity import DEFAULT_LIMITS, SeverityLimits, loss_interval
from kpt_lightning.tracking.thresholds import GATE_FEWEST_RUNS

LONGEST_TAIL = 10
"""Newest runs in which the gate looks for a loss that is too young for a change point: those need three runs at least,
and more where the loss is small."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The base of a new run.

    Attributes:
        places: Of its runs in the history, ascending.
        since: Place of the first run at a worse level, which stands and is no base; None where there is none.
    """

    places: tuple[int, ...]
    since: int | None = None


def reference(
    values: Sequence[float], *, accepted: Sequence[bool] | None = None, higher_is_better: bool = False,
    limits: SeverityLimits = DEFAULT_LIMITS,
) -> Reference:  # fmt: skip
    """Walk through the levels of a history, oldest first, and say which of them holds.

    A level whose certain loss is minor or worse than what holds does not take its place, however long it stands, unless
    one of its runs was accepted. A certain gain of that size takes its place once it has runs enough to judge by: what
    was gained and is lost again is a loss. Levels between both are taken as they come, yet losses too small to name add
    up, since each level is compared with the one that holds. Runs of a level that is not apart are added to it.

    Args:
        values: One of each earlier run in one environment, oldest first, without the new ones; finite.
        accepted: Whether somebody accepted that run as a base; none if not given.
        higher_is_better: True for a throughput, False for a time, memory or a loss.
        limits: Of the severities.

    Raises:
        ValueError: A value is not finite, or ``accepted`` is of another length.
    """
    accepted = [False] * len(values) if accepted is None else accepted
    if len(accepted) != len(values):
        raise ValueError(f"accepted={len(accepted)} entries: must be one of each run, {len(values)}.")
    history = in_range(checked("values", values, 0))
    found = _by_levels(history, accepted, higher_is_better, limits)
    if found.since is None and found.places:
        found = _without_worse_tail(history, found.places, accepted, higher_is_better, limits)
    return found


def _by_levels(history: Array, accepted: Sequence[bool], higher: bool, limits: SeverityLimits) -> Reference:
    changes = detect_changes(history.tolist(), higher_is_better=higher, limits=limits)
    edges = [*(change.index for change in changes), len(history)]
    holds = [*range(edges[0])]
    base, since = holds, None
    for start, stop in pairwise(edges):
        level = [*range(start, stop)]
        low, high = _loss(history, holds, level, higher)
        if low >= limits.minor and not any(accepted[place] for place in level):
            base, since = holds, start if since is None else since
            continue
        since = None
        if low >= limits.minor or (high <= -limits.minor and len(level) >= GATE_FEWEST_RUNS):
            holds = base = level
        elif low <= 0.0 <= high:
            holds = base = [*holds, *level]
        else:
            base = level if len(level) >= GATE_FEWEST_RUNS else holds
    return Reference(tuple(base), since)


def _loss(history: Array, before: Sequence[int], after: Sequence[int], higher: bool) -> tuple[float, float]:
    """95 % interval of the relative loss between two levels."""
    interval = relative_shift(history[[*before, *after]], len(before))[1]
    return loss_interval(interval.low, interval.high, higher)


def _without_worse_tail(
    history: Array, places: tuple[int, ...], accepted: Sequence[bool], higher: bool, limits: SeverityLimits
) -> Reference:
    """Without the newest runs of a base where these are certainly worse than the rest of it."""
    for count in range(_suspects(history, places, accepted, higher, limits), 0, -1):
        before, tail = places[:-count], places[-count:]
        verdict = compare(
            history[[*before]].tolist(), history[[*tail]].tolist(), higher_is_better=higher, limits=limits
        )
        if verdict.outcome == "regression" and verdict.severity is not None:
            return Reference(before, tail[0])
    return Reference(places)


def _suspects(
    history: Array, places: tuple[int, ...], accepted: Sequence[bool], higher: bool, limits: SeverityLimits
) -> int:
    """How many of the newest runs are each worse than the usual level by the smallest limit: a cheap first look."""
    most = min(LONGEST_TAIL, len(places) - GATE_FEWEST_RUNS)
    if most < 1 or places[-1] != len(history) - 1:
        return 0
    usual = statistics.median(history[[*places[: len(places) - most]]].tolist()) or 0.0
    loss = (history[[*places[-most:]]] - usual) * (-1.0 if higher else 1.0)
    suspect = (loss >= limits.minor * abs(usual)) & ~np.array([accepted[place] for place in places[-most:]])
    return most if suspect.all() else int(np.argmin(suspect[::-1]))
