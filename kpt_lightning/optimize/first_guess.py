"""The plan by rules as the first trial: its changes together, so that little time is enough for what matters most."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from kpt_lightning.candidates.candidate import Change, SelfChecking
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.errors import UnsupportedHardwareError
from kpt_lightning.measure.interleave import measure_gain
from kpt_lightning.optimize.by_proof import extended
from kpt_lightning.optimize.guarded import guarded
from kpt_lightning.optimize.laboratory import Laboratory, record_calls_of
from kpt_lightning.optimize.loss_gate import LossGate
from kpt_lightning.optimize.rules import make_plan
from kpt_lightning.optimize.trial import compare, judge_gain, self_check
from kpt_lightning.optimize.trial_record import TrialRecord
from kpt_lightning.optimize.work import Work
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.state import preserved

RULES = "plan by rules"
"""Name of its trial."""


def guess(subject: Subject, work: Work, known: Collection[str]) -> list[Change]:
    """What rules and proofs would do to the model, as far as its precision allows; it is afterwards as before.

    Args:
        subject: The model and what surrounds it.
        work: Its forward pass.
        known: Names of candidates; others are left out.
    """
    try:
        plan = make_plan(subject.model, subject.config, subject.profile, parallel=None)
    except UnsupportedHardwareError:
        # The candidates say what is not possible, each for itself.
        return []
    if subject.compute_dtype is not torch.bfloat16:
        plan = replace(plan, changes=[change for change in plan.changes if change.candidate != "float8"])
    if plan.float8_layers:
        plan = extended(plan, subject, work.loss)
    return [change for change in plan.changes if change.candidate in known]


def try_together(laboratory: Laboratory, changes: Sequence[Change], losses: LossGate) -> TrialRecord:
    """Whether several changes pass the gates of their kinds and are faster, judged as one.

    Raises:
        KptError: The device does not answer any more, or the state of the model could not be put back.
    """
    record = TrialRecord(
        candidate=RULES, level=laboratory.subject.config.level.value,
        what=", ".join(change.candidate for change in changes),
    )  # fmt: skip
    return guarded(laboratory.subject, record, lambda: _judged(laboratory, changes, losses, record))


def _judged(
    laboratory: Laboratory, changes: Sequence[Change], losses: LossGate, record: TrialRecord
) -> TrialRecord:  # fmt: skip
    subject = laboratory.subject
    candidates = [laboratory.lookup(change.candidate) for change in changes]
    lossy = any(each.numerics is Numerics.PRECISION for each in candidates)
    numerics = Numerics.PRECISION if lossy else Numerics.ROUNDING
    verdicts = [compare(laboratory, changes, numerics, laboratory.baseline)]
    verdicts += [self_check(laboratory, changes, each) for each in candidates if isinstance(each, SelfChecking)]
    record = replace(record, gate="; ".join(verdict.reason for verdict in verdicts))
    if wrong := [verdict.reason for verdict in verdicts if not verdict]:
        return record.refused(f"numbers differ: {'; '.join(wrong)}")
    with preserved(subject.model):
        gain = measure_gain(
            laboratory.state([]), laboratory.state(changes), laboratory.train_once, device=subject.device,
            rounds=laboratory.rounds, deadline=laboratory.deadline,
        )  # fmt: skip
    kept, reason = judge_gain(gain)
    record = replace(record.timed(gain), kept=kept, reason=reason)
    if kept and lossy:
        record = losses.judged(record, changes)
    if record.kept:
        with laboratory.state(laboratory.eager(changes))():
            record_calls_of(subject, laboratory.work)
    return record
