"""One metric of one key through time: its runs, environments and change points."""

from collections.abc import Sequence
from dataclasses import dataclass

from kpt_lightning.tracking.change_points import Change, detect_changes
from kpt_lightning.tracking.differences import environment_changes, environment_facts
from kpt_lightning.tracking.record import RunKey, RunRecord
from kpt_lightning.tracking.severity import DEFAULT_LIMITS, SeverityLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run.

    Attributes:
        run: The record.
        value: Its median of the metric.
        environment: Number of its environment in this timeline, from 1, in the order in which they appear.
        environment_changes: Name to (old, new) against the run before, where an environment appears; empty elsewhere.
        change: The lasting change of level that begins here; None elsewhere.
    """

    run: RunRecord
    value: float
    environment: int
    environment_changes: dict[str, tuple[str | None, str | None]]
    change: Change | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The finished runs of a key that have a metric, oldest first.

    Attributes:
        key: Of the runs.
        metric: Its name.
        unit: Of all values; runs in another unit than the newest one are left out.
        better: "lower" or "higher".
        points: One for each run.
    """

    key: RunKey
    metric: str
    unit: str
    better: str
    points: tuple[Point, ...]


def timeline(runs: Sequence[RunRecord], metric: str, limits: SeverityLimits = DEFAULT_LIMITS) -> Timeline | None:
    """The history of one metric, None where no run has it.

    Runs of one environment are one series however they are mixed with others, as hosts take turns.

    Args:
        runs: Finished runs of one key, oldest first.
        metric: Its name.
        limits: Of the severities.
    """
    having = [run for run in runs if metric in run.metrics]
    if not having:
        return None
    newest = having[-1].metrics[metric]
    having = [run for run in having if run.metrics[metric].unit == newest.unit]
    environments = _environments(having)
    places: dict[int, list[int]] = {}
    for place, number in enumerate(environments):
        places.setdefault(number, []).append(place)
    changes = {}
    for of_one in places.values():
        values = [having[place].metrics[metric].median for place in of_one]
        for change in detect_changes(values, higher_is_better=newest.better == "higher", limits=limits):
            changes[of_one[change.index]] = change
    begins = {of_one[0] for of_one in places.values()} - {0}
    points = tuple(
        Point(
            run=run, value=run.metrics[metric].median, environment=environments[place], change=changes.get(place),
            environment_changes=environment_changes(having[place - 1], run) if place in begins else {},
        )
        for place, run in enumerate(having)
    )  # fmt: skip
    return Timeline(key=having[-1].key, metric=metric, unit=newest.unit, better=newest.better, points=points)


def _environments(runs: Sequence[RunRecord]) -> list[int]:
    """Number of each run's environment, the commit left out, from 1 in the order in which they appear."""
    known: dict[frozenset[tuple[str, str]], int] = {}
    return [known.setdefault(frozenset(environment_facts(run).items()), len(known) + 1) for run in runs]
