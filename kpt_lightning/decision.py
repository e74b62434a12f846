"""Decisions carry reasons: each probe, choice and optimization is Accepted or Rejected, printed and stored."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Accepted:
    """The subject is used.

    Attributes:
        subject: What was decided on, such as ``"fp8"`` or ``"layers.0.mlp.up_proj"``.
        reason: Why, one clause for a person to read.
    """

    subject: str
    reason: str

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Rejected:
    """The subject is not used. Attributes as in :class:`Accepted`."""

    subject: str
    reason: str

    def __bool__(self) -> bool:
        return False


Decision = Accepted | Rejected


def to_dict(decision: Decision) -> dict[str, str | bool]:
    """The decision as JSON-like data."""
    return {"subject": decision.subject, "accepted": bool(decision), "reason": decision.reason}


def from_dict(data: dict[str, str | bool]) -> Decision:
    """The inverse of :func:`to_dict`."""
    kind = Accepted if data["accepted"] else Rejected
    return kind(subject=str(data["subject"]), reason=str(data["reason"]))
