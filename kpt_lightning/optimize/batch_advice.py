"""How many rows fit once the plan has saved memory: advice, for the batch size is the user's."""

from collections.abc import Sequence
from typing import Any

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.measure.batch import batch_size
from kpt_lightning.measure.micro_batch import largest_batch
from kpt_lightning.optimize.apply import Lookup, applied
from kpt_lightning.optimize.surroundings import surroundings
from kpt_lightning.optimize.work import Work
from kpt_lightning.validation.state import preserved, surrounded_by

_MOST_TIMES = 16
"""Times the rows of the batch that are tried at most."""


def advise_batch(
    subject: Subject, work: Work, changes: Sequence[Change], lookup: Lookup, *, max_seconds: float
) -> Decision:
    """Try 1, 2, 4 ... times the rows with ``changes`` in force; the model is afterwards as before."""
    given = work.batch
    counted = batch_size(given)
    if counted is None:
        return Rejected("largest batch", "the batch has no rows that can be counted")

    def run(batch: Any) -> None:
        work.batch = batch
        work.loss().backward()  # type: ignore[no-untyped-call]
        subject.model.zero_grad(set_to_none=True)

    try:
        around = surrounded_by(*surroundings(subject, work))
        with around, applied(subject, changes, lookup), preserved(subject.model):
            points = largest_batch(
                run, given, _MOST_TIMES * counted.samples, device=subject.device, max_seconds=max_seconds
            )
    except ConfigError as error:
        return Rejected("largest batch", str(error))
    finally:
        work.batch = given
    if not points:
        return Rejected("largest batch", f"not even the {counted.samples} rows of this batch fit")
    most = points[-1]
    speed = most.samples_per_second / points[0].samples_per_second
    tried = "" if most.size < _MOST_TIMES * counted.samples else ", the most that was tried"
    return Accepted(
        "largest batch",
        f"{most.size} rows fit{tried}, at {speed:.2f}x the samples/s of {counted.samples}; the batch size is yours",
    )
