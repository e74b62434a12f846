"""How bad is a loss? Judged by what is certain of it, never by the estimate alone."""

import math
from dataclasses import dataclass
from typing import Literal

Severity = Literal["minor", "moderate", "severe", "improvement"]


@dataclass(frozen=True, slots=True)
class SeverityLimits:
    """From which relative loss on a change has a name; a loss of 0.02 is 2 %.

    The defaults are a choice: Megatron-LM fails a run at 5 %, pytest-benchmark and asv users at 5 to 10 %.

    Attributes:
        minor: Smallest loss that is called minor.
        moderate: Smallest loss that is called moderate.
        severe: Smallest loss that is called severe.

    Raises:
        ValueError: The limits are not finite, not positive or not in ascending order.
    """

    minor: float = 0.02
    moderate: float = 0.05
    severe: float = 0.15

    def __post_init__(self) -> None:
        if not 0.0 < self.minor <= self.moderate <= self.severe < math.inf:
            given = (self.minor, self.moderate, self.severe)
            raise ValueError(f"limits={given!r}: must be positive, finite and ascending: minor, moderate, severe.")

    def of_loss(self, low: float, high: float) -> Severity | None:
        """Name of a loss by its interval.

        Args:
            low: Lower end of the 95 % interval of the relative loss; negative where the metric may have improved.
            high: Upper end of the same interval.

        Returns:
            The worst class that ``low`` reaches; "improvement" where the whole interval lies below zero; None where the
            loss may be smaller than ``minor``.
        """
        if high < 0.0:
            return "improvement"
        if low >= self.severe:
            return "severe"
        if low >= self.moderate:
            return "moderate"
        return "minor" if low >= self.minor else None


DEFAULT_LIMITS = SeverityLimits()


def loss_interval(low: float, high: float, higher_is_better: bool) -> tuple[float, float]:
    """The interval of a relative shift as one of a loss: mirrored where more is better."""
    return (-high, -low) if higher_is_better else (low, high)
