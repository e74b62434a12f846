"""What a search found: data."""

from dataclasses import dataclass, field

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.optimize.trial_record import TrialRecord


@dataclass(slots=True)
class Outcome:
    """What a search found.

    Attributes:
        changes: What is kept, alone or nothing.
        trials: Every trial and every refusal, in order.
        whole: All changes together against the unchanged model; None where nothing was kept.
        seconds: What the search took.
    """

    changes: list[Change] = field(default_factory=list)
    trials: list[TrialRecord] = field(default_factory=list)
    whole: TrialRecord | None = None
    seconds: float = 0.0
