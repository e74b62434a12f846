"""What an optimization looks like: it proposes changes to a model, applies one in place, and undoes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Decision, Rejected
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.gates import Numerics


class Stage(IntEnum):
    """The order in which changes are applied; they are undone in reverse."""

    WEIGHTS = 10
    """Dtypes and classes of layers: FP8."""
    MODULES = 20
    """Other code for a module: fused norms, merged projections."""
    ATTENTION = 30
    MEMORY = 40
    """Activation checkpointing."""
    COMPILE = 50
    OPTIMIZER = 60
    INPUT = 70
    """The data loader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that can be done to a model.

    Attributes:
        candidate: Name of the candidate that proposes it.
        setting: All that ``apply`` needs, JSON-like, so that a stored plan can be replayed.
        reason: Why it is proposed, one clause.
        predicted: Speed expected from rules, new over old, such as 1.2; None where there is no estimate.
        fallback: Tried only where none of the candidate's other changes is kept.
        saves_bytes: Memory that it promises to save, for a change whose purpose is memory; else None.
    """

    candidate: str
    setting: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    predicted: float | None = None
    saves_bytes: int | None = None
    fallback: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-like data."""
        return {
            "candidate": self.candidate,
            "setting": dict(self.setting),
            "reason": self.reason,
            "predicted": self.predicted,
            "saves_bytes": self.saves_bytes,
            "fallback": self.fallback,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Change":
        """The inverse of :meth:`to_dict`."""
        return cls(**data)


@runtime_checkable
class Candidate(Protocol):
    """One optimization. An object of this form named ``CANDIDATE`` in a module of this package is found by itself.

    Attributes:
        name: Unique, in snake case.
        level: The lowest level that allows it.
        stage: When it is applied, among others.
        turn: When it is tried, the smallest first: what others build on comes early.
        numerics: What it may change in the numbers.
        features: Names of ``HardwareProfile.supports`` that it needs.
        packages: Optional packages that it needs.
    """

    name: str
    level: Level
    stage: Stage
    turn: int
    numerics: Numerics
    features: tuple[str, ...]
    packages: tuple[OptionalPackage, ...]

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """What could be done here, alternatives of which at most one is kept, or why nothing can.

        Level, features and packages were checked before. The model is not changed.
        """
        ...

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> Any:
        """Make one change, in place, leaving everything as it was where it raises.

        Returns:
            What :meth:`undo` needs.

        Raises:
            ConfigError: A stored setting does not fit this model.
        """
        ...

    def undo(self, subject: Subject, applied: Any) -> None:
        """Leave the model as it was before :meth:`apply`; parameters keep what they learned in between."""
        ...


@runtime_checkable
class SelfChecking(Protocol):
    """A candidate that compares what it replaced with the original by itself, besides the model as a whole."""

    def check(self, subject: Subject, run: Callable[[], Tensor]) -> Decision:
        """Look at the changed, not compiled model; its state is preserved around.

        Args:
            subject: With the change in force.
            run: One forward pass to the loss.
        """
        ...
