"""Acknowledged regressions: known, with a reason, for a limited time."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking import schema
from kpt_lightning.tracking.events import author, utc_now
from kpt_lightning.tracking.severity import Severity
from kpt_lightning.tracking.store import RunStore

SEVERITIES: tuple[Severity, ...] = ("minor", "moderate", "severe")
"""Of regressions, the least first."""

BASE_RUNS_KEPT = 100
"""Newest runs from before a regression that an acknowledgement remembers: more hardly sharpen a level."""

EndKind = Literal["recovered", "worsened"]
State = Literal["live", "expired", "recovered", "worsened", "replaced"]


def rank(severity: Severity | None) -> int:
    """Place in :data:`SEVERITIES`; -1 for a regression that may be smaller than the smallest limit."""
    return SEVERITIES.index(severity) if severity in SEVERITIES else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class AckEnd:
    """Why an acknowledgement ended before its time.

    Attributes:
        kind: "recovered": the runs are as before the regression; "worsened": they lose a severity more than was known.
        created_at: When it was seen, UTC, ISO 8601.
        run_id: The newest run that showed it.
    """

    kind: EndKind
    created_at: str
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """A regression that does not fail ``kpt regress check`` while the acknowledgement lives.

    Attributes:
        ack_id: Unique.
        key_digest: Of the runs' key.
        run_name: Name in the key, for the reader.
        metric: The one that got worse.
        severity: Of what was known; None where it may have been smaller than minor.
        shift: Relative shift of what was known; 0.03 is 3 % more.
        base_runs: Ids of the runs before the regression: what recovery is judged by.
        reason: Why it is accepted for now.
        author: Who said so.
        created_at: When, UTC, ISO 8601.
        expires_at: Until when, UTC, ISO 8601.
        end: What ended it early; None while nothing did.
        replaced: Whether a later acknowledgement of the same key and metric took its place.
    """

    ack_id: str
    key_digest: str
    run_name: str
    metric: str
    severity: Severity | None
    shift: float
    base_runs: tuple[str, ...]
    reason: str
    author: str
    created_at: str
    expires_at: str
    end: AckEnd | None = None
    replaced: bool = False

    def state(self, now: datetime | None = None) -> State:
        """What has become of it by ``now``, an aware time; the present if not given."""
        if self.end is not None:
            return self.end.kind
        if self.replaced:
            return "replaced"
        return "live" if (now or utc_now()) < datetime.fromisoformat(self.expires_at) else "expired"


def new_ack(
    *, key_digest: str, run_name: str, metric: str, severity: Severity | None, shift: float, base_runs: Sequence[str],
    reason: str, expires: datetime,
) -> Ack:  # fmt: skip
    """An acknowledgement by the present user, now; ``expires`` is an aware time."""
    return Ack(
        ack_id=uuid.uuid4().hex, key_digest=key_digest, run_name=run_name, metric=metric, severity=severity,
        shift=shift, base_runs=tuple(base_runs[-BASE_RUNS_KEPT:]), reason=reason, author=author(),
        created_at=utc_now().isoformat(timespec="milliseconds"), expires_at=expires.isoformat(timespec="milliseconds"),
    )  # fmt: skip


def acknowledge(store: RunStore, acks: Sequence[Ack]) -> None:
    """Append all or none of them.

    Raises:
        HistoryError: The store cannot be written.
    """
    rows = []
    for ack in acks:
        data = asdict(ack)
        del data["end"], data["replaced"]
        rows.append({"kind": "acknowledged", "event": json.dumps(data, allow_nan=False)})
    _append(store, rows)


def end_acks(store: RunStore, ends: Sequence[tuple[Ack, AckEnd]]) -> None:
    """Append what ended; a second end of the same acknowledgement is never read.

    Raises:
        HistoryError: The store cannot be written.
    """
    _append(
        store, [{"kind": end.kind, "event": json.dumps({"ack_id": ack.ack_id, **asdict(end)})} for ack, end in ends]
    )


def all_acks(store: RunStore) -> list[Ack]:
    """Every acknowledgement, oldest first, with what ended it.

    Raises:
        HistoryError: The store cannot be read, or a row is damaged.
    """
    store.open()
    with store.connect() as connection:
        query = sa.select(schema.acks.c.kind, schema.acks.c.event).order_by(schema.acks.c.sequence)
        rows = connection.execute(query).all()
    found: dict[str, Ack] = {}
    for kind, row in rows:
        values = store.parse(row)
        try:
            if kind == "acknowledged":
                ack = Ack(**values | {"base_runs": tuple(values["base_runs"])})
                datetime.fromisoformat(ack.expires_at)
                _replace_older(found, ack)
            elif found[values["ack_id"]].end is None:
                ack_id = values.pop("ack_id")
                found[ack_id] = replace(found[ack_id], end=AckEnd(**values))
        except (KeyError, TypeError, ValueError) as error:
            raise HistoryError(
                f"history={store.place!r}: an acknowledgement does not have the form of this version ({error!r}). Read "
                "it with the version of kpt-lightning that wrote it."
            ) from error
    return list(found.values())


def _replace_older(found: dict[str, Ack], new: Ack) -> None:
    for ack_id, ack in found.items():
        if (ack.key_digest, ack.metric) == (new.key_digest, new.metric):
            found[ack_id] = replace(ack, replaced=True)
    found[new.ack_id] = new


def _append(store: RunStore, rows: Sequence[dict[str, str]]) -> None:
    store.open()
    if rows:
        with store.connect() as connection:
            connection.execute(sa.insert(schema.acks), list(rows))
