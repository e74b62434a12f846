"""What all trials of one search share."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from kpt_lightning.candidates.candidate import Change, SelfChecking, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.measure.interleave import ROUNDS
from kpt_lightning.optimize.apply import Lookup, applied
from kpt_lightning.optimize.baseline import Baseline
from kpt_lightning.optimize.work import Work
from kpt_lightning.validation.calls import record_calls
from kpt_lightning.validation.reading import Expected
from kpt_lightning.validation.state import preserved


@dataclass(slots=True)
class Laboratory:
    """What all trials of one search share.

    Attributes:
        subject: The model and what surrounds it; unchanged between trials.
        work: Its forward pass on a real batch.
        baseline: Of the kept changes that are ``steady``, without compilation.
        lookup: Name to candidate.
        deadline: Value of ``time.monotonic()`` when time is out.
        rounds: Pairs of timings in a trial.
        stepped: Candidates whose changes touch the optimizer, found as they are tried.
        rates: What ``optimizer_steps.visible_rates`` found.
        expected: What the noise of a format does to the unchanged model, by format: four passes in eager mode each.
    """

    subject: Subject
    work: Work
    baseline: Baseline
    lookup: Lookup
    deadline: float
    rounds: int = ROUNDS
    stepped: set[str] = field(default_factory=set)
    rates: dict[float, list[Any]] = field(default_factory=dict)
    expected: dict[Hashable, Expected | None] = field(default_factory=dict)

    def state(self, changes: Sequence[Change]) -> Callable[[], AbstractContextManager[None]]:
        """The model with these changes, while entered."""
        return lambda: applied(self.subject, changes, self.lookup)

    def steady(self, changes: Sequence[Change]) -> list[Change]:
        """Those changes on which others that only round can be judged: not layers in FP8, which check themselves.

        A value that differs in its last bit may be rounded to another neighbour in FP8, a thousand times as far away:
        one H200's atomic additions move the median gradient of a Llama of 1.2 B parameters to 19.8 dB there.
        """
        return [change for change in changes if not isinstance(self.lookup(change.candidate), SelfChecking)]

    def eager(self, changes: Sequence[Change]) -> list[Change]:
        """Those changes that compile nothing."""
        return [change for change in changes if self.lookup(change.candidate).stage is not Stage.COMPILE]

    def train_once(self) -> None:
        """One forward and backward pass; gradients are dropped."""
        train_once(self.subject, self.work)

    def with_step(self) -> None:
        """One whole optimizer step."""
        assert self.subject.optimizer is not None
        self.work.loss().backward()  # type: ignore[no-untyped-call]
        self.subject.optimizer.step()
        self.subject.optimizer.zero_grad(set_to_none=True)


def record_calls_of(subject: Subject, work: Work) -> None:
    """How the model calls its modules in the state that it is in, for candidates to look at."""
    with preserved(subject.model), torch.compiler.set_stance("force_eager"):
        subject.calls = record_calls(subject.model, work.loss)


def train_once(subject: Subject, work: Work) -> None:
    """One forward and backward pass; gradients are dropped."""
    work.loss().backward()  # type: ignore[no-untyped-call]
    subject.model.zero_grad(set_to_none=True)
