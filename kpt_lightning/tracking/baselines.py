"""Named baselines: runs that somebody pinned as the base of a key, and the gate before such a pin moves."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking import schema
from kpt_lightning.tracking.differences import environment_changes
from kpt_lightning.tracking.events import author, utc_now
from kpt_lightning.tracking.gate import Verdict, compare
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.reference import reference
from kpt_lightning.tracking.severity import DEFAULT_LIMITS, SeverityLimits
from kpt_lightning.tracking.store import RunStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One pin: from ``created_at`` on these runs are the base of a key under a name.

    Attributes:
        name: Of the baseline, such as "main".
        key_digest: Of the runs' key.
        run_ids: The pinned runs, oldest first.
        author: Who pinned them.
        created_at: When, UTC, ISO 8601.
        reason: Why, as the author gave it; empty where none was needed.
    """

    name: str
    key_digest: str
    run_ids: tuple[str, ...]
    author: str
    created_at: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What a pin would do to one metric of a key.

    Attributes:
        run_name: Name in the key.
        key_digest: Of the key.
        metric: Its name.
        verdict: Of the newly pinned runs against those pinned before.
        environment: Name to (old, new) of what changed between both; may be the cause.
        against: What the newly pinned runs were compared with, in words.
    """

    run_name: str
    key_digest: str
    metric: str
    verdict: Verdict
    environment: Mapping[str, tuple[str | None, str | None]]
    against: str = "the pinned runs"


def new_baseline(name: str, runs: Sequence[RunRecord], reason: str = "") -> Baseline:
    """A pin by the present user, now; ``runs`` are of one key, oldest first, at least one."""
    return Baseline(
        name=name, key_digest=runs[-1].key.digest, run_ids=tuple(run.run_id for run in runs), author=author(),
        created_at=utc_now().isoformat(timespec="milliseconds"), reason=reason,
    )  # fmt: skip


def pin(store: RunStore, baselines: Sequence[Baseline]) -> None:
    """Append all or none of them; older pins stay in the log.

    Raises:
        HistoryError: The store cannot be written.
    """
    store.open()
    rows = [{"name": each.name, "event": json.dumps(asdict(each))} for each in baselines]
    if rows:
        with store.connect() as connection:
            connection.execute(sa.insert(schema.baselines), rows)


def pins(store: RunStore, name: str | None = None) -> list[Baseline]:
    """All pins, oldest first; with ``name`` only those under it.

    Raises:
        HistoryError: The store cannot be read, or a row is damaged.
    """
    store.open()
    query = sa.select(schema.baselines.c.event).order_by(schema.baselines.c.sequence)
    if name is not None:
        query = query.where(schema.baselines.c.name == name)
    with store.connect() as connection:
        rows = connection.execute(query).scalars().all()
    return [_read(store, row) for row in rows]


def pinned(store: RunStore, name: str) -> dict[str, Baseline]:
    """Key digest to the pin that holds now, the newest of each key, under one name.

    Raises:
        HistoryError: The store cannot be read, or a row is damaged.
    """
    return {each.key_digest: each for each in pins(store, name)}


def accepted_runs(store: RunStore) -> frozenset[str]:
    """Ids of the runs that are pinned now under any name: whoever pinned them accepted their level.

    Raises:
        HistoryError: The store cannot be read, or a row is damaged.
    """
    newest = {(each.name, each.key_digest): each for each in pins(store)}
    return frozenset(run_id for each in newest.values() for run_id in each.run_ids)


def moves(before: Sequence[RunRecord], now: Sequence[RunRecord], limits: SeverityLimits = DEFAULT_LIMITS) -> list[Move]:
    """What happens to each metric when ``now`` takes the place of ``before``; both of one key, oldest first.

    Runs that are in both say nothing about a move and are left out of the new ones.
    """
    old_ids = {run.run_id for run in before}
    fresh = [run for run in now if run.run_id not in old_ids]
    if not before or not fresh:
        return []
    found = []
    for name, metric in fresh[-1].metrics.items():
        old, new = (
            [run.metrics[name].median for run in runs if name in run.metrics and run.metrics[name].unit == metric.unit]
            for runs in (before, fresh)
        )
        if not old:
            continue
        verdict = compare(old, new, higher_is_better=metric.better == "higher", limits=limits)
        found.append(
            Move(
                run_name=fresh[-1].key.name,
                key_digest=fresh[-1].key.digest,
                metric=name,
                verdict=verdict,
                environment=environment_changes(before[-1], fresh[-1]),
            )
        )
    return found


def standing_moves(
    runs: Sequence[RunRecord], now: Sequence[RunRecord], accepted: Collection[str],
    limits: SeverityLimits = DEFAULT_LIMITS,
) -> list[Move]:  # fmt: skip
    """What a pin would accept: the losses that stand in the runs of one key, see :func:`.reference.reference`.

    Args:
        runs: Finished runs of the key, oldest first.
        now: Those to be pinned, at least one.
        accepted: Ids of the runs that were accepted before.
        limits: Of the severities.
    """
    newest, found = now[-1], []
    until = [run.run_id for run in runs].index(newest.run_id) + 1
    alike = [run for run in runs[:until] if not environment_changes(run, newest)]
    for name, metric in newest.metrics.items():
        having = [run for run in alike if name in run.metrics and run.metrics[name].unit == metric.unit]
        values, higher = [run.metrics[name].median for run in having], metric.better == "higher"
        known = [run.run_id in accepted for run in having]
        holds = reference(values, accepted=known, higher_is_better=higher, limits=limits)
        if holds.since is None:
            continue
        before = [values[place] for place in holds.places]
        found.append(
            Move(
                run_name=newest.key.name, key_digest=newest.key.digest, metric=name, environment={},
                verdict=compare(before, values[holds.since :], higher_is_better=higher, limits=limits),
                against=f"the runs before {having[holds.since].run_id[:12]}",
            )
        )  # fmt: skip
    return found


def _read(store: RunStore, row: str) -> Baseline:
    values = store.parse(row)
    try:
        return Baseline(**values | {"run_ids": tuple(values["run_ids"])})
    except (KeyError, TypeError) as error:
        raise HistoryError(
            f"history={store.place!r}: a baseline does not have the form of this version ({error!r}). Read it with the "
            "version of kpt-lightning that wrote it."
        ) from error
