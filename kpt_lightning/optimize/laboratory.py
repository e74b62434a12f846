"""What all trials of one search share."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.measure.interleave import ROUNDS
from kpt_lightning.optimize.apply import Lookup, applied
from kpt_lightning.optimize.baseline import Baseline
from kpt_lightning.optimize.work import Work


@dataclass(slots=True)
class Laboratory:
    """What all trials of one search share.

    Attributes:
        subject: The model and what surrounds it; unchanged between trials.
        work: Its forward pass on a real batch.
        baseline: Of the kept changes without compilation.
        lookup: Name to candidate.
        deadline: Value of ``time.monotonic()`` when time is out.
        rounds: Pairs of timings in a trial.
        stepped: Candidates whose changes touch the optimizer, found as they are tried.
        rates: What ``optimizer_steps.visible_rates`` found.
    """

    subject: Subject
    work: Work
    baseline: Baseline
    lookup: Lookup
    deadline: float
    rounds: int = ROUNDS
    stepped: set[str] = field(default_factory=set)
    rates: dict[float, list[Any]] = field(default_factory=dict)

    def state(self, changes: Sequence[Change]) -> Callable[[], AbstractContextManager[None]]:
        """The model with these changes, while entered."""
        return lambda: applied(self.subject, changes, self.lookup)

    def train_once(self) -> None:
        """One forward and backward pass; gradients are dropped."""
        train_once(self.subject, self.work)

    def with_step(self) -> None:
        """One whole optimizer step."""
        assert self.subject.optimizer is not None
        self.work.loss().backward()  # type: ignore[no-untyped-call]
        self.subject.optimizer.step()
        self.subject.optimizer.zero_grad(set_to_none=True)


def train_once(subject: Subject, work: Work) -> None:
    """One forward and backward pass; gradients are dropped."""
    work.loss().backward()  # type: ignore[no-untyped-call]
    subject.model.zero_grad(set_to_none=True)
