"""What people decided about a history as lines of an export: baselines, acknowledgements and how these ended."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter

from kpt_lightning.tracking.acks import Ack, AckEnd, EndKind, acknowledge, all_acks, end_acks
from kpt_lightning.tracking.baselines import Baseline, pin, pins
from kpt_lightning.tracking.store import RunStore

BASELINE, ACKNOWLEDGED = "baseline", "acknowledged"
Made = TypeVar("Made", Baseline, Ack, AckEnd)

KINDS = (BASELINE, ACKNOWLEDGED, *get_args(EndKind))
"""Of the lines: a pin, an acknowledgement, or its end."""


@dataclass(slots=True)
class Decisions:
    """Decisions that were read from lines and belong into a history.

    Attributes:
        baselines: Pins.
        acks: Acknowledgements.
        ends: Ends of acknowledgements, by the id of theirs.
    """

    baselines: list[Baseline] = field(default_factory=list)
    acks: list[Ack] = field(default_factory=list)
    ends: dict[str, AckEnd] = field(default_factory=dict)

    def read(self, kind: str, values: Mapping[str, Any]) -> None:
        """Take one line.

        Args:
            kind: One of :data:`KINDS`.
            values: The line without its kind.

        Raises:
            ValueError: A field is missing, unknown or of the wrong type.
        """
        if kind == BASELINE:
            self.baselines.append(_made(Baseline, values))
        elif kind == ACKNOWLEDGED:
            self.acks.append(_made(Ack, values))
        else:
            rest = {name: value for name, value in values.items() if name != "ack_id"}
            self.ends.setdefault(str(values.get("ack_id")), _made(AckEnd, {"kind": kind, **rest}))


@dataclass(frozen=True, slots=True)
class Added:
    """What became of them: added, and left out because the history holds a later one for the same runs."""

    baselines: int = 0
    acks: int = 0
    superseded: int = 0


def lines(store: RunStore) -> list[dict[str, Any]]:
    """Every decision of a history as JSON-like data, oldest first.

    Raises:
        HistoryError: The store cannot be read, or a row is damaged.
    """
    found: list[dict[str, Any]] = [{"kind": BASELINE, **asdict(each)} for each in pins(store)]
    acks = all_acks(store)
    for ack in acks:
        values = asdict(ack)
        del values["end"], values["replaced"]
        found.append({"kind": ACKNOWLEDGED, **values})
    return found + [{**asdict(ack.end), "ack_id": ack.ack_id} for ack in acks if ack.end is not None]


def add(store: RunStore, decisions: Decisions) -> Added:
    """Append what the history does not know; an older decision never takes the place of a later one that it holds.

    Raises:
        HistoryError: The store cannot be read or written.
    """
    known = pins(store)
    held = {(each.name, each.key_digest): each.created_at for each in known}
    new = _unlike(decisions.baselines, known)
    late = [each for each in new if each.created_at >= held.get((each.name, each.key_digest), "")]
    pin(store, late)
    acks, left_out = _add_acks(store, decisions)
    return Added(len(late), acks, len(new) - len(late) + left_out)


def _add_acks(store: RunStore, decisions: Decisions) -> tuple[int, int]:
    """How many acknowledgements were added, and how many left out."""
    known = {each.ack_id: each for each in all_acks(store)}
    held = {(each.key_digest, each.metric): each.created_at for each in known.values()}
    new = list({each.ack_id: each for each in decisions.acks if each.ack_id not in known}.values())
    late = [each for each in new if each.created_at >= held.get((each.key_digest, each.metric), "")]
    acknowledge(store, late)
    now_there = known | {each.ack_id: each for each in late}
    ends = [(now_there[ack_id], end) for ack_id, end in decisions.ends.items() if ack_id in now_there]
    end_acks(store, [(ack, end) for ack, end in ends if ack.end is None])
    return len(late), len(new) - len(late)


def _unlike(given: Sequence[Baseline], known: Sequence[Baseline]) -> list[Baseline]:
    there = set(known)
    return [each for each in dict.fromkeys(given) if each not in there]


def _made(kind: type[Made], values: Mapping[str, Any]) -> Made:
    unknown = values.keys() - {each.name for each in fields(kind)}
    if unknown:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    return TypeAdapter(kind).validate_python(values)
