"""A whole history judged once: what ``kpt regress check`` shows, and what it remembers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from kpt_lightning.errors import ConfigError
from kpt_lightning.tracking.acks import Ack, AckEnd, all_acks, end_acks
from kpt_lightning.tracking.alerts import Alert, group_alerts
from kpt_lightning.tracking.baselines import accepted_runs, pinned
from kpt_lightning.tracking.broken import ENOUGH_MEMORY, FINITE_LOSS, broken_runs
from kpt_lightning.tracking.check import Checked, check_runs, finished_by_key
from kpt_lightning.tracking.events import utc_now
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.runs_by_key import choose_keys
from kpt_lightning.tracking.severity import DEFAULT_LIMITS, SeverityLimits
from kpt_lightning.tracking.store import RunStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What was found.

    Attributes:
        records: The runs of the keys that were judged, oldest first.
        found: One entry for each metric of each key.
        alerts: Its regressions, grouped, see :func:`.alerts.group_alerts`.
        unstored: Acknowledgements that ended, which could not be stored because the history cannot be written.
    """

    records: tuple[RunRecord, ...]
    found: tuple[Checked, ...]
    alerts: tuple[Alert, ...]
    unstored: tuple[Ack, ...] = ()


def review(
    store: RunStore, *, new: int = 1, metrics: Collection[str] | None = None, limits: SeverityLimits = DEFAULT_LIMITS,
    baseline: str | None = None, key: str | None = None, name: str | None = None, now: datetime | None = None,
) -> Review:  # fmt: skip
    """Judge the newest runs of each key, with baselines and acknowledgements, and store which of these ended.

    Without ``baseline`` a loss stands until it is over, accepted or acknowledged, see :func:`.reference.reference`.

    Args:
        store: The history.
        new: How many runs of each key are the new ones.
        metrics: Names; all that the newest run has if not given.
        limits: Of the severities.
        baseline: Name of the baseline to judge by; the runs before the new ones if not given.
        key: Digest of the key that is judged, or its beginning; all if not given.
        name: Name of the runs that are judged; all if not given.
        now: Aware time by which acknowledgements expire; the present if not given.

    Raises:
        ConfigError: No finished run has this key or name, or no run has any of ``metrics``.
        HistoryError: The store cannot be read or written.
        ValueError: ``new`` is less than 1.
    """
    records, acks = _chosen(store.all(), key, name), all_acks(store)
    _check_metrics(records, metrics)
    now = now or utc_now()
    pins = None if baseline is None else pinned(store, baseline)
    found = check_runs(
        records, new=new, metrics=metrics, limits=limits, baseline=baseline, pins=pins, acks=acks, now=now,
        accepted=accepted_runs(store),
    )  # fmt: skip
    found += broken_runs(records, now=now, metrics=metrics, acks=acks)
    ended = [each.ended for each in found if each.ended is not None]
    return Review(
        records=tuple(records), found=tuple(found), alerts=tuple(group_alerts(found, records)),
        unstored=_store_ends(store, ended),
    )  # fmt: skip


def _chosen(records: Sequence[RunRecord], key: str | None, name: str | None) -> list[RunRecord]:
    """The runs of the keys that are meant; an empty history has none, and that is no wrong name."""
    if not records or (key is None and name is None):
        return list(records)
    meant = choose_keys(finished_by_key(records), key=key, name=name)
    return [record for record in records if record.key.digest in meant]


def _check_metrics(records: Sequence[RunRecord], metrics: Collection[str] | None) -> None:
    """One of several may be missing: a build names the throughput in tokens and in samples."""
    known = {name for record in records for name in record.metrics}
    if metrics and known and not known.union((FINITE_LOSS, ENOUGH_MEMORY)).intersection(metrics):
        rule = f"no run here has it; there are: {', '.join(sorted(known))}"
        raise ConfigError("--metric", ", ".join(metrics), rule, "Give one of these")


def _store_ends(store: RunStore, ended: Sequence[tuple[Ack, AckEnd]]) -> tuple[Ack, ...]:
    """The acknowledgements whose end could not be stored."""
    if store.read_only:
        return tuple(ack for ack, _ in ended)
    end_acks(store, ended)
    return ()
