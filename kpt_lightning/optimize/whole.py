"""All kept changes together, measured against the unchanged model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.measure.interleave import Gain, measure_gain
from kpt_lightning.optimize.baseline import Baseline
from kpt_lightning.optimize.guarded import told
from kpt_lightning.optimize.laboratory import Laboratory
from kpt_lightning.optimize.optimizer_steps import preserved_optimizer
from kpt_lightning.optimize.outcome import Outcome
from kpt_lightning.optimize.trial import judge_gain
from kpt_lightning.optimize.trial_record import TrialRecord
from kpt_lightning.optimize.whole_numbers import compare_whole
from kpt_lightning.validation.state import preserved

Say = Callable[[str], None]


def judge_whole(laboratory: Laboratory, plain: Baseline, outcome: Outcome, say: Say) -> None:
    """Measure all kept changes together; where they are not faster, the unchanged model is what trains."""
    if not outcome.changes:
        say("nothing is kept: the unchanged model trains")
        return
    subject = laboratory.subject
    stages = {laboratory.lookup(change.candidate).stage for change in outcome.changes}
    for_memory = any(change.saves_bytes is not None for change in outcome.changes)
    begin = time.monotonic()
    what = ", ".join(change.candidate for change in outcome.changes)
    record = TrialRecord(candidate="all kept changes", level=subject.config.level.value, what=what)
    try:
        verdict = compare_whole(laboratory, outcome.changes, plain)
        with preserved(subject.model, weights=Stage.OPTIMIZER not in stages):
            if stages == {Stage.INPUT}:
                outcome.whole = replace(record, kept=True, reason="only data loading is changed", gate=verdict.reason)
                return
            gain = _measure_whole(laboratory, outcome.changes, Stage.OPTIMIZER in stages)
            if not judge_gain(gain)[0] and gain.ratio > 1.0:
                # Each part was surely faster by itself: noise is the likelier reason.
                gain = _measure_whole(laboratory, outcome.changes, Stage.OPTIMIZER in stages)
    except Exception as error:  # noqa: BLE001  together they may fail where each alone did not
        reason = f"failed together: {told(error)}"
        _drop_all(outcome, replace(record, reason=reason), say)
        return
    record = replace(
        record, gain=gain.ratio, low=gain.expect_low, high=gain.expect_high, gate=verdict.reason,
        seconds=time.monotonic() - begin,
    )  # fmt: skip
    keep, reason = judge_gain(gain)
    if not verdict:
        _drop_all(outcome, replace(record, reason=f"together the numbers differ: {verdict.reason}"), say)
    elif not keep and not for_memory:
        _drop_all(outcome, replace(record, reason=f"together: {reason}"), say)
    else:
        outcome.whole = replace(record, kept=True, reason="faster" if keep else "smaller")
        say(f"all together: {gain.ratio:.3f}x ({gain.expect_low:.3f} to {gain.expect_high:.3f})")


def _measure_whole(laboratory: Laboratory, changes: Sequence[Change], steps: bool) -> Gain:
    device = laboratory.subject.device
    states = laboratory.state([]), laboratory.state(changes)
    if not steps:
        return measure_gain(*states, laboratory.train_once, device=device, rounds=laboratory.rounds)
    with preserved_optimizer(laboratory.subject):
        return measure_gain(*states, laboratory.with_step, device=device, rounds=laboratory.rounds)


def _drop_all(outcome: Outcome, record: TrialRecord, say: Say) -> None:
    outcome.whole = record
    outcome.changes = []
    outcome.trials = [
        replace(trial, kept=False, reason=f"{trial.reason}, but {record.reason}") if trial.kept else trial
        for trial in outcome.trials
    ]
    say(f"the unchanged model trains: {record.reason}")
