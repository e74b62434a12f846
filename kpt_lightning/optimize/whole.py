"""All kept changes together, measured against the unchanged model."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.measure.interleave import Gain, measure_gain
from kpt_lightning.optimize.baseline import Baseline
from kpt_lightning.optimize.first_guess import RULES
from kpt_lightning.optimize.guarded import guarded
from kpt_lightning.optimize.laboratory import Laboratory
from kpt_lightning.optimize.optimizer_steps import preserved_optimizer
from kpt_lightning.optimize.outcome import Outcome
from kpt_lightning.optimize.trial import judge_gain
from kpt_lightning.optimize.trial_record import TrialRecord
from kpt_lightning.optimize.whole_numbers import compare_whole
from kpt_lightning.validation.state import preserved

Say = Callable[[str], None]

_FURTHER = 2
"""Measurements that are added to the first while its forecast does not exclude that the whole is slower."""


def judge_whole(laboratory: Laboratory, plain: Baseline, outcome: Outcome, say: Say) -> None:
    """Measure all kept changes together; where they are not faster, the unchanged model is what trains.

    Data loading overlaps with the step, is no part of this measurement, and stays.

    Raises:
        KptError: The device does not answer any more, or the state of the model could not be put back.
    """
    if not outcome.changes:
        say("nothing is kept: the unchanged model trains")
        return
    changes = [each for each in outcome.changes if laboratory.lookup(each.candidate).stage is not Stage.INPUT]
    record = TrialRecord(
        candidate="all kept changes",
        level=laboratory.subject.config.level.value,
        what=", ".join(change.candidate for change in changes or outcome.changes),
    )
    if not changes:
        outcome.whole = replace(record, kept=True, reason="only data loading is changed")
        return
    record = guarded(laboratory.subject, record, lambda: _judged(laboratory, changes, plain, record))
    outcome.whole = record
    if not record.kept:
        _drop(outcome, changes, record, say)
    elif record.gain is not None:
        say(f"all together: {record.gain:.3f}x ({record.expect_low:.3f} to {record.expect_high:.3f})")


def _judged(laboratory: Laboratory, changes: Sequence[Change], plain: Baseline, record: TrialRecord) -> TrialRecord:
    verdict = compare_whole(laboratory, changes, plain)
    record = replace(record, gate=verdict.reason)
    if not verdict:
        return record.refused(f"the numbers differ: {verdict.reason}")
    steps = any(change.candidate in laboratory.stepped for change in changes)
    with preserved(laboratory.subject.model, weights=not steps):
        gain = _measure_whole(laboratory, changes, steps)
        for _ in range(_FURTHER):
            # The state of the machine may flip between one measurement and the next, and within none of them.
            if gain.ratio <= 1.0 or gain.expect_low > 1.0:
                break
            gain = _measure_whole(laboratory, changes, steps, gain)
    record = record.forecast(gain)
    keep, reason = judge_gain(gain)
    if not keep and not any(change.saves_bytes is not None for change in changes):
        return record.refused(reason)
    return replace(record, kept=True, reason="faster" if keep else "smaller")


def _measure_whole(laboratory: Laboratory, changes: Sequence[Change], steps: bool, earlier: Gain | None = None) -> Gain:
    with preserved_optimizer(laboratory.subject) if steps else nullcontext():
        return measure_gain(
            laboratory.state([]), laboratory.state(changes), laboratory.with_step if steps else laboratory.train_once,
            device=laboratory.subject.device, rounds=laboratory.rounds, earlier=earlier,
        )  # fmt: skip


def _drop(outcome: Outcome, changes: Sequence[Change], record: TrialRecord, say: Say) -> None:
    names = {RULES, *(change.candidate for change in changes)}
    outcome.changes = [change for change in outcome.changes if change.candidate not in names]
    outcome.trials = [
        trial.refused(f"{trial.reason}, but together: {record.reason}", trial.ended)
        if trial.kept and trial.candidate in names
        else trial
        for trial in outcome.trials
    ]
    rest = "with data loading changed" if outcome.changes else "as it is"
    say(f"the unchanged model trains, {rest}; together: {record.reason}")
