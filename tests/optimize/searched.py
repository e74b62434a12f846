"""A search among made candidates, and what it found; for the tests of the search."""

from typing import Any

from torch import nn

from kpt_lightning.optimize.outcome import Outcome
from kpt_lightning.optimize.search import search
from kpt_lightning.optimize.trial_record import TrialRecord
from kpt_lightning.validation.workload import Workload
from tests.optimize.faults import batch, subject

NAP = 0.06


def run(model: nn.Module, *candidates: Any, data: Any = None, max_seconds: float = 60.0, rounds: int = 6) -> Outcome:
    data = batch() if data is None else data
    return search(subject(model, data), Workload(model, data), max_seconds=max_seconds, pool=candidates, rounds=rounds)


def only(outcome: Outcome) -> TrialRecord:
    (trial,) = outcome.trials
    return trial
