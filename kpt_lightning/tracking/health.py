"""Can a history be trusted, and what could the gate see by it?"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import sqlalchemy as sa

from kpt_lightning.tracking import schema
from kpt_lightning.tracking.acks import Ack, all_acks
from kpt_lightning.tracking.baselines import pins
from kpt_lightning.tracking.check import finished_by_key
from kpt_lightning.tracking.differences import environment_changes
from kpt_lightning.tracking.events import utc_now
from kpt_lightning.tracking.gate import compare, level_of
from kpt_lightning.tracking.record import RunKey, RunRecord
from kpt_lightning.tracking.store import RunStore
from kpt_lightning.tracking.thresholds import GATE_FEWEST_RUNS, gate_quantiles

CLOCK_TOLERANCE = timedelta(minutes=1)
"""Clocks of hosts may differ by less than this, and two runs that end together are stored in either order: a choice."""

EXPIRES_SOON = timedelta(days=3)
"""An acknowledgement that ends within this time is told: a choice, a weekend."""

NEW_RUNS = (1, 3)
"""Numbers of new runs for which the smallest visible shift is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricHealth:
    """What the newest level of one metric allows.

    Attributes:
        metric: Its name.
        unit: Of ``level``.
        runs: Runs in the newest environment since the last change of level.
        level: Their level, cut at 2.5 sigmas; None where there are too few.
        noise: Robust standard deviation between runs over the level; None where there are too few, or the level is 0.
        visible: Number of new runs -> smallest relative shift beyond the gate's limit; empty where there are too few.
    """

    metric: str
    unit: str
    runs: int
    level: float | None
    noise: float | None
    visible: dict[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyHealth:
    """One key: its runs by status, and its metrics.

    Attributes:
        key: Of the runs.
        statuses: Status -> runs.
        comparable: Finished runs in the newest one's environment.
        judgeable: Whether these are enough to judge another run by.
        metrics: Of the newest finished run.
    """

    key: RunKey
    statuses: dict[str, int]
    comparable: int
    judgeable: bool
    metrics: tuple[MetricHealth, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Of a whole history.

    Attributes:
        place: Path or URL, without a password.
        schema_version: Of its tables.
        integrity: "ok", what SQLite found wrong, or "left to the server".
        journal_mode: SQLite's, "wal" as a rule; empty for a server.
        read_only: Whether this process cannot write it.
        keys: One entry for each key, in order of the first run.
        problems: Runs that look wrong, a sentence each.
        live_acks: Acknowledgements that hold now.
        expiring_acks: Ids of those that end within three days.
        baselines: Name -> number of keys with pinned runs.
    """

    place: str
    schema_version: int
    integrity: str
    journal_mode: str
    read_only: bool
    keys: tuple[KeyHealth, ...]
    problems: tuple[str, ...]
    live_acks: tuple[Ack, ...]
    expiring_acks: tuple[str, ...]
    baselines: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-like data; each key has its digest."""
        data = asdict(self)
        for entry, health in zip(data["keys"], self.keys, strict=True):
            entry["digest"] = health.key.digest
        return data


def examine(store: RunStore, now: datetime | None = None) -> Health:
    """Look at everything; changes nothing but an older schema, and not that of a history that is read-only.

    Args:
        store: The history.
        now: Aware time; the present if not given.

    Raises:
        HistoryError: The store cannot be read, or a row is damaged.
    """
    now = now or utc_now()
    integrity, journal_mode = _database(store)
    records = store.all()
    live = [ack for ack in all_acks(store) if ack.state(now) == "live"]
    pinned = {(pin.name, pin.key_digest) for pin in pins(store)}
    by_key: dict[str, list[RunRecord]] = {}
    for record in records:
        by_key.setdefault(record.key.digest, []).append(record)
    return Health(
        place=store.place, schema_version=schema.SCHEMA_VERSION, integrity=integrity, journal_mode=journal_mode,
        read_only=store.read_only,
        keys=tuple(_key_health(runs) for runs in by_key.values()),
        problems=(*_clock_problems(records, now), *_repeated(records)), live_acks=tuple(live),
        expiring_acks=tuple(
            ack.ack_id for ack in live if datetime.fromisoformat(ack.expires_at) - now <= EXPIRES_SOON
        ),
        baselines=dict(sorted(Counter(name for name, _ in pinned).items())),
    )  # fmt: skip


def smallest_visible_shift(values: Sequence[float], new: int) -> float | None:
    """The relative shift of ``new`` runs beyond which :func:`.gate.compare` decides.

    Args:
        values: One of each older run, oldest first.
        new: How many new runs, 1 or more.

    Returns:
        None where the older runs are too few, or their level is 0.
    """
    verdict = compare(values, [values[-1]] * new)
    if not verdict.interval.finite:
        return None
    # The gate's interval and its limit of decision are quantiles of one statistic, so their ratio is known.
    decisive, usual = gate_quantiles(verdict.baseline_runs)
    return verdict.interval.half_width * decisive / usual


def _database(store: RunStore) -> tuple[str, str]:
    store.open()
    if not store.is_file:
        return "left to the server", ""
    with store.connect() as connection:
        found = connection.execute(sa.text("PRAGMA integrity_check")).scalars().all()
        mode: str = connection.execute(sa.text("PRAGMA journal_mode")).scalar_one()
    return "; ".join(found), mode


def _key_health(runs: Sequence[RunRecord]) -> KeyHealth:
    statuses = dict(Counter(run.status for run in runs))
    finished = finished_by_key(runs).get(runs[-1].key.digest, [])
    alike = [run for run in finished if not environment_changes(run, finished[-1])]
    metrics = [_metric_health(alike, name) for name in alike[-1].metrics] if alike else []
    return KeyHealth(
        key=runs[-1].key, statuses=statuses, comparable=len(alike), judgeable=len(alike) >= GATE_FEWEST_RUNS,
        metrics=tuple(metrics),
    )  # fmt: skip


def _metric_health(runs: Sequence[RunRecord], name: str) -> MetricHealth:
    unit = runs[-1].metrics[name].unit
    values = [run.metrics[name].median for run in runs if name in run.metrics and run.metrics[name].unit == unit]
    since = compare(values, values[-1:]).baseline_runs
    level = noise = None
    if since >= GATE_FEWEST_RUNS:
        levels, sigmas = level_of(np.array(values[-since:])[None])
        level = float(levels[0])
        noise = float(sigmas[0]) / abs(level) if level else None
    shifts = {new: smallest_visible_shift(values, new) for new in NEW_RUNS}
    visible = {new: shift for new, shift in shifts.items() if shift is not None}
    return MetricHealth(metric=name, unit=unit, runs=since, level=level, noise=noise, visible=visible)


def _clock_problems(records: Sequence[RunRecord], now: datetime) -> list[str]:
    """Runs from the future, and runs that say to be older than the one stored before them."""
    found, times = [], [(run, _time(run)) for run in records]
    for run, when in times:
        if when is None:
            found.append(f"run {run.run_id}: created_at={run.created_at!r} is no time")
        elif when - now > CLOCK_TOLERANCE:
            found.append(f"run {run.run_id}: created at {run.created_at}, which is still to come")
    known = [(run, when) for run, when in times if when is not None]
    for (older, before), (run, when) in itertools.pairwise(known):
        if before - when > CLOCK_TOLERANCE:
            found.append(
                f"run {run.run_id}: created at {run.created_at}, stored after run {older.run_id} of "
                f"{older.created_at}: a clock went back, or it was imported"
            )
    return found


def _time(run: RunRecord) -> datetime | None:
    try:
        found = datetime.fromisoformat(run.created_at)
    except ValueError:
        return None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found


def _repeated(records: Sequence[RunRecord]) -> list[str]:
    """Runs that are equal in all but their id."""
    first: dict[tuple[str, str, str], str] = {}
    found = []
    for run in records:
        measured = repr(sorted(run.metrics.items(), key=lambda item: item[0]))
        kept = first.setdefault((run.key.digest, run.created_at, measured), run.run_id)
        if kept != run.run_id:
            found.append(f"run {run.run_id}: equal to run {kept} in time and metrics: stored twice")
    return found
