"""What a validation found: one decision per check, accepted where nothing is wrong."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kpt_lightning.decision import Decision, to_dict

SHOWN = 3


@dataclass(frozen=True, slots=True)
class Findings:
    """The result of a validation.

    Attributes:
        decisions: Subject is the check or the setting; a Rejected reason says what to do.
    """

    decisions: tuple[Decision, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was rejected."""
        return all(self.decisions)

    @property
    def faults(self) -> tuple[Decision, ...]:
        """What was rejected."""
        return tuple(each for each in self.decisions if not each)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def __getitem__(self, subject: str) -> Decision:
        """The decision on a subject. Raises KeyError where it was not checked."""
        for each in self.decisions:
            if each.subject == subject:
                return each
        raise KeyError(subject)

    def render(self) -> str:
        """One line for each decision."""
        return "\n".join(f"{'ok   ' if each else 'FAULT'}  {each.subject}: {each.reason}" for each in self.decisions)

    def to_dict(self) -> dict[str, Any]:
        """JSON-like data."""
        return {"ok": self.ok, "findings": [to_dict(each) for each in self.decisions]}


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    text = ", ".join(every[:SHOWN])
    return text if len(every) <= SHOWN else f"{text} and {len(every) - SHOWN} more"
