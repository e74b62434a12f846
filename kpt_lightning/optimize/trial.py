"""One trial: apply a change, compare the numbers, time it against the state without it, undo it."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from kpt_lightning.candidates.candidate import Candidate, Change, SelfChecking, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.decision import Decision, Rejected
from kpt_lightning.errors import KptError
from kpt_lightning.measure.interleave import Gain, measure_gain
from kpt_lightning.measure.saved import peak_of, saved_bytes
from kpt_lightning.measure.statistics import values_needed
from kpt_lightning.optimize.baseline import Baseline, evaluating
from kpt_lightning.optimize.fewer_bits import bits_of, expect
from kpt_lightning.optimize.guarded import guarded
from kpt_lightning.optimize.laboratory import Laboratory
from kpt_lightning.optimize.trial_record import TrialRecord
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.loss_run import preserved_weights, room_for_weights
from kpt_lightning.validation.reading import distance, judge, read
from kpt_lightning.validation.state import preserved

NEGLIGIBLE = 1.005
"""A gain below half a per cent is not worth a change, however sure it is."""


def try_change(laboratory: Laboratory, kept: Sequence[Change], change: Change) -> TrialRecord:
    """Whether ``change`` on top of ``kept`` passes its gate and is faster, or smaller where that is its purpose.

    A failure of any kind inside the change is its rejection. The model is afterwards without any change.

    Raises:
        KptError: The device does not answer any more, or the state of the model could not be put back.
    """
    candidate = laboratory.lookup(change.candidate)
    record = TrialRecord(
        candidate=change.candidate, setting=dict(change.setting), level=candidate.level.value, what=change.reason,
        predicted=change.predicted,
    )  # fmt: skip
    return guarded(laboratory.subject, record, lambda: _tried(laboratory, kept, change, candidate, record))


def _tried(
    laboratory: Laboratory, kept: Sequence[Change], change: Change, candidate: Candidate, record: TrialRecord
) -> TrialRecord:
    if candidate.stage is Stage.INPUT:
        # Loading overlaps with the step: only the candidate itself can tell, from both, what waits for what.
        return replace(record, kept=True, gain=change.predicted, reason="measured with the loader alone")
    if candidate.stage is not Stage.OPTIMIZER:
        verdict = compare(laboratory, [*kept, change], candidate.numerics, laboratory.baseline)
        record = replace(record, gate=verdict.reason)
        if not verdict:
            return replace(record, reason=f"numbers differ: {verdict.reason}")
        if isinstance(candidate, SelfChecking):
            verdict = _self_check(laboratory, [*kept, change], candidate)
            record = replace(record, gate=f"{record.gate}; {verdict.reason}")
            if not verdict:
                return replace(record, reason=f"numbers differ: {verdict.reason}")
        if time.monotonic() > laboratory.deadline:
            return record.refused("no time left to measure it; raise max_seconds", "no time")
    with ExitStack() as guard:
        run = _program(laboratory, candidate, guard)
        gain = measure_gain(
            laboratory.state(kept), laboratory.state([*kept, change]), run, device=laboratory.subject.device,
            rounds=laboratory.rounds, deadline=laboratory.deadline,
        )  # fmt: skip
        memory = _memory(laboratory, kept, change, run)
    record = replace(record, gain=gain.ratio, low=gain.low, high=gain.high, memory_bytes=memory)
    if change.saves_bytes is not None:
        return _judged_by_memory(record, change.saves_bytes)
    keep, reason = judge_gain(gain)
    return replace(record, kept=keep, reason=reason)


def _self_check(laboratory: Laboratory, changes: Sequence[Change], candidate: SelfChecking) -> Decision:
    """Without compilation, which hides a model's insides."""
    subject = laboratory.subject
    eager = [change for change in changes if laboratory.lookup(change.candidate).stage is not Stage.COMPILE]
    with laboratory.state(eager)(), evaluating(subject.model, laboratory.baseline.random), preserved(subject.model):
        return candidate.check(subject, laboratory.work.loss)


def judge_gain(gain: Gain) -> tuple[bool, str]:
    """Whether a gain is one, and why."""
    if gain.rounds < values_needed():
        slower = f"slower in each of {gain.rounds} rounds"
        return False, slower if gain.ratio < 1.0 else f"{gain.rounds} rounds are too few to tell; raise max_seconds"
    if gain.low <= 1.0:
        return False, "not faster" if gain.ratio <= 1.0 else "not surely faster"
    if gain.ratio < NEGLIGIBLE:
        return False, "faster by less than half a per cent"
    return True, "faster"


def compare(laboratory: Laboratory, changes: Sequence[Change], numerics: Numerics, baseline: Baseline) -> Decision:
    """Numbers of the model with ``changes`` against ``baseline``, as a decision."""
    subject = laboratory.subject
    if reason := baseline.why_not(numerics):
        return Rejected("gate", reason)
    with laboratory.state(changes)(), evaluating(subject.model, baseline.random), count_gemms() as gemms:
        reading = read(subject.model, laboratory.work.loss_and_outputs)
        dtype, bits = subject.compute_dtype, bits_of(subject)
    planned = next((change for change in changes if change.candidate == "float8"), None)
    if planned is not None and not gemms.total:
        raise KptError("FP8 layers are in place and no FP8 product ran: the model runs stale compiled code")
    expected = None
    if numerics is Numerics.PRECISION:
        with evaluating(subject.model, baseline.random):
            expected = expect(subject.model, laboratory.work.loss_and_outputs, bits)
    verdict = judge(distance(baseline.reading, reading), gate(numerics, dtype), baseline.rounding, expected)
    note = f"; {baseline.note}" if baseline.note else ""
    return replace(verdict, reason=verdict.reason + note)


def _program(laboratory: Laboratory, candidate: Candidate, guard: ExitStack) -> Callable[[], object]:
    """What is timed, and in ``guard`` what puts back its traces."""
    subject = laboratory.subject
    guard.enter_context(preserved(subject.model, weights=candidate.stage is not Stage.OPTIMIZER))
    if candidate.stage is Stage.OPTIMIZER:
        guard.enter_context(preserved_optimizer(subject))
        return laboratory.with_step
    return laboratory.train_once


@contextmanager
def preserved_optimizer(subject: Subject) -> Any:
    """Let the optimizer step; weights and its state are put back from a copy on the host.

    Raises:
        KptError: There is no room for the copy, or the optimizer has state of a run before.
    """
    optimizer = subject.optimizer
    if optimizer is None:
        raise KptError("no optimizer is known; pass optimizer=")
    if any(optimizer.state.values()):
        raise KptError("the optimizer has state already, which steps of a trial would change")
    if not (room := room_for_weights(subject.model)):
        raise KptError(room.reason)
    with preserved_weights(subject.model):
        try:
            yield
        finally:
            optimizer.state.clear()


def _memory(laboratory: Laboratory, kept: Sequence[Change], change: Change, run: Callable[[], object]) -> int | None:
    """Bytes that the change adds to the peak; on a device that does not tell, to what is saved for backward."""
    device, found = laboratory.subject.device, []
    for changes in (kept, [*kept, change]):
        with laboratory.state(changes)():
            if device.type == "cuda":
                found.append(peak_of(run, device))
            elif change.saves_bytes is not None:
                found.append(saved_bytes(laboratory.work.loss))
    return None if len(found) < 2 or None in found else found[1] - found[0]  # type: ignore[operator]


def _judged_by_memory(record: TrialRecord, promised: int) -> TrialRecord:
    if record.memory_bytes is None:
        return replace(record, reason="this device does not tell what memory it saves")
    saved = -record.memory_bytes
    text = f"saves {saved / 1e6:,.0f} MB of {promised / 1e6:,.0f} MB promised"
    return replace(record, kept=saved >= promised, reason=text)
