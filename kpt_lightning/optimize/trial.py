"""One trial: apply a change, compare the numbers, time it against the state without it, undo it."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from kpt_lightning.candidates.candidate import Candidate, Change, SelfChecking, Stage
from kpt_lightning.decision import Decision, Rejected
from kpt_lightning.errors import KptError
from kpt_lightning.measure.interleave import Gain, measure_gain
from kpt_lightning.measure.saved import peak_of, saved_bytes
from kpt_lightning.measure.statistics import values_needed
from kpt_lightning.optimize.baseline import Baseline, evaluating
from kpt_lightning.optimize.fewer_bits import Bits, bits_of, expect
from kpt_lightning.optimize.guarded import guarded
from kpt_lightning.optimize.laboratory import Laboratory
from kpt_lightning.optimize.optimizer_steps import preserved_optimizer, touches_optimizer
from kpt_lightning.optimize.optimizer_trial import compare_steps
from kpt_lightning.optimize.trial_record import TrialRecord
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.reading import Expected, distance, judge, read
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
        told = "" if change.predicted is None else f", {change.predicted:.2f}x expected from both"
        return replace(record, kept=True, reason=f"loader and step measured apart{told}")
    if steps := touches_optimizer(laboratory, kept, change):
        laboratory.stepped.add(change.candidate)
    verdict = _numbers(laboratory, kept, change, candidate)
    record = replace(record, gate=verdict.reason)
    if not verdict:
        return record.refused(f"numbers differ: {verdict.reason}")
    if time.monotonic() > laboratory.deadline:
        return record.refused("no time left to measure it; raise max_seconds", "no time")
    with ExitStack() as guard:
        run = _program(laboratory, steps, guard)
        gain = measure_gain(
            laboratory.state(kept), laboratory.state([*kept, change]), run, device=laboratory.subject.device,
            rounds=laboratory.rounds, deadline=laboratory.deadline,
        )  # fmt: skip
        memory = _memory(laboratory, kept, change, run)
    record = replace(record.timed(gain), memory_bytes=memory)
    if change.saves_bytes is not None:
        return _judged_by_memory(record, change.saves_bytes)
    keep, reason = judge_gain(gain)
    return replace(record, kept=keep, reason=reason)


def _numbers(laboratory: Laboratory, kept: Sequence[Change], change: Change, candidate: Candidate) -> Decision:
    """What the gate of the candidate's kind says."""
    if candidate.stage is Stage.OPTIMIZER:
        return compare_steps(laboratory, kept, change, candidate.numerics)
    if candidate.numerics is not Numerics.PRECISION and len(steady := laboratory.steady(kept)) < len(kept):
        # Nothing is timed in that state, so that nothing need be compiled for it; the whole is compared compiled.
        kept = laboratory.eager(steady)
    verdict = compare(laboratory, [*kept, change], candidate.numerics, laboratory.baseline)
    if not verdict or not isinstance(candidate, SelfChecking):
        return verdict
    checked = self_check(laboratory, [*kept, change], candidate)
    return replace(checked, reason=f"{verdict.reason}; {checked.reason}")


def self_check(laboratory: Laboratory, changes: Sequence[Change], candidate: SelfChecking) -> Decision:
    """What a candidate says of its own change, without compilation, which hides a model's insides."""
    subject = laboratory.subject
    with (
        laboratory.state(laboratory.eager(changes))(),
        evaluating(subject.model, laboratory.baseline.random),
        preserved(subject.model),
    ):
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
    expected = _expected(laboratory, bits, baseline) if numerics is Numerics.PRECISION else None
    verdict = judge(distance(baseline.reading, reading), gate(numerics, dtype), baseline.rounding, expected)
    note = f"; {baseline.note}" if baseline.note else ""
    return replace(verdict, reason=verdict.reason + note)


def _expected(laboratory: Laboratory, bits: Bits, baseline: Baseline) -> Expected | None:
    key = (bits, baseline.random)
    if key not in laboratory.expected:
        with evaluating(laboratory.subject.model, baseline.random):
            laboratory.expected[key] = expect(laboratory.subject.model, laboratory.work.loss_and_outputs, bits)
    return laboratory.expected[key]


def _program(laboratory: Laboratory, steps: bool, guard: ExitStack) -> Callable[[], object]:
    """What is timed, and in ``guard`` what puts back its traces."""
    subject = laboratory.subject
    guard.enter_context(preserved(subject.model, weights=not steps))
    if steps:
        guard.enter_context(preserved_optimizer(subject))
        return laboratory.with_step
    return laboratory.train_once


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
