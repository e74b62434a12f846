"""What one trial showed: data for the plan."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kpt_lightning.measure.interleave import Gain


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One change, tried or turned down.

    Attributes:
        candidate: Its name.
        setting: What was tried, as in ``Change``; empty where nothing could be.
        level: The lowest level that allows it.
        what: What was proposed, one clause.
        kept: Whether it is in the plan.
        reason: Why, or why not.
        predicted: Speed expected from rules, new over old; None without an estimate.
        gain: Measured speed, new over old; None where it was not timed.
        low: Lower end of the interval of ``gain``, which is the median of the rounds; None where they were too few.
        high: Upper end of it.
        expect_low: Lower end of where a measurement repeated later will fall; given for the whole plan alone.
        expect_high: Upper end of it.
        memory_bytes: Change of peak memory, negative is less; None where the device does not tell.
        gate: What the comparison of numbers said; empty where it was not reached.
        seconds: What the trial cost.
        ended: "judged", "failed" where code raised, or "no time" where the deadline came first.
    """

    candidate: str
    setting: Mapping[str, Any] = field(default_factory=dict)
    level: str = ""
    what: str = ""
    kept: bool = False
    reason: str = ""
    predicted: float | None = None
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    expect_low: float | None = None
    expect_high: float | None = None
    memory_bytes: int | None = None
    gate: str = ""
    seconds: float = 0.0
    ended: str = "judged"

    def refused(self, reason: str, ended: str = "judged") -> "TrialRecord":
        """The record, not kept."""
        return replace(self, kept=False, reason=reason, ended=ended)

    def timed(self, gain: Gain) -> "TrialRecord":
        """The record with the figures of a measurement; ends that too few rounds leave open are None, as JSON wants."""
        return replace(self, gain=gain.ratio, low=_end(gain.low), high=_end(gain.high))

    def forecast(self, gain: Gain) -> "TrialRecord":
        """Likewise, with where a later measurement falls."""
        return replace(self.timed(gain), expect_low=_end(gain.expect_low), expect_high=_end(gain.expect_high))

    def to_dict(self) -> dict[str, Any]:
        """JSON-like data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TrialRecord":
        """The inverse of :meth:`to_dict`."""
        return cls(**data)


def _end(value: float) -> float | None:
    return None if value in (0.0, math.inf) else value
