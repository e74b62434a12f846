"""The search: candidates in turn, each tried on top of what was kept; then the whole against the unchanged model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Candidate, Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Decision, Rejected
from kpt_lightning.errors import ConfigError, KptError
from kpt_lightning.measure.interleave import ROUNDS, SLOW_ROUNDS, SLOW_SECONDS, Gain, measure_gain
from kpt_lightning.measure.statistics import median
from kpt_lightning.optimize.apply import applied
from kpt_lightning.optimize.baseline import Baseline, take_baseline
from kpt_lightning.optimize.trial import Laboratory, compare, judge_gain, preserved_optimizer, try_change
from kpt_lightning.optimize.trial_record import TrialRecord
from kpt_lightning.optimize.work import Work, resampled
from kpt_lightning.validation.calls import record_calls
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.loss_run import STEPS, judge_losses, losses_after, room_for_weights
from kpt_lightning.validation.reading import read
from kpt_lightning.validation.state import preserved

Say = Callable[[str], None]

_LEVELS = tuple(Level)


@dataclass(slots=True)
class Outcome:
    """What a search found.

    Attributes:
        changes: What is kept, alone or nothing.
        trials: Every trial and every refusal, in order.
        whole: All changes together against the unchanged model; None where nothing was kept.
        seconds: What the search took.
    """

    changes: list[Change] = field(default_factory=list)
    trials: list[TrialRecord] = field(default_factory=list)
    whole: TrialRecord | None = None
    seconds: float = 0.0


def search(
    subject: Subject,
    work: Work,
    *,
    max_seconds: float,
    pool: Sequence[Candidate] | None = None,
    rounds: int | None = None,
    say: Say = lambda text: None,
) -> Outcome:
    """Try everything that the level allows and keep what measurably helps; the model is afterwards as before.

    Args:
        subject: The model and what surrounds it.
        work: Its forward pass on a real batch.
        max_seconds: No trial starts after that; one that runs is finished, for a compiler cannot be stopped.
        pool: Candidates to try; all that are known by default.
        rounds: Pairs of timings in a trial; by the length of a step if not given.
        say: Told what happens, one line at a time.

    Raises:
        ConfigError: ``max_seconds`` is not positive.
        KptError: The model does not train on this batch, or the device failed.
    """
    if not max_seconds > 0:
        raise ConfigError("max_seconds", max_seconds, "must be above 0", "Give about 120")
    start = time.monotonic()
    candidates = tuple(registry.candidates() if pool is None else pool)
    by_name = {each.name: each for each in candidates}
    deadline = start + max_seconds
    plain = _first_look(subject, work)
    if rounds is None:
        rounds = SLOW_ROUNDS if (subject.step_seconds or 0.0) > SLOW_SECONDS else ROUNDS
    laboratory = Laboratory(subject, work, plain, by_name.__getitem__, deadline, rounds)
    say(f"unchanged: {subject.step_seconds or 0:.4f} s for one forward and backward pass")
    outcome = Outcome()
    losses = _LossGate(laboratory)
    for candidate in candidates:
        _try_candidate(laboratory, candidate, outcome, losses, say)
    _judge_whole(laboratory, plain, outcome, say)
    outcome.seconds = time.monotonic() - start
    return outcome


def _first_look(subject: Subject, work: Work) -> Baseline:
    """Run the unchanged model; what fails here is the user's."""
    try:
        # As it is, before anything looks on: what the user compiles must not be compiled with an observer inside.
        read(subject.model, work.loss_and_outputs)
        _record(subject, work)
        baseline = take_baseline(subject, work.loss_and_outputs)
        subject.step_seconds = _seconds(subject, work)
    except KptError:
        raise
    except Exception as error:
        raise KptError(
            f"the unchanged model does not train on this batch, so nothing can be tried: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}. Make one forward and backward pass work first"
        ) from error
    return baseline


def _record(subject: Subject, work: Work) -> None:
    with preserved(subject.model), torch.compiler.set_stance("force_eager"):
        subject.calls = record_calls(subject.model, work.loss)


def _seconds(subject: Subject, work: Work) -> float:
    laboratory = Laboratory(subject, work, None, registry.candidate, 0.0)  # type: ignore[arg-type]
    times = []
    with preserved(subject.model):
        for _ in range(3):
            begin = time.perf_counter()
            laboratory.train_once()
            _wait(subject)
            times.append(time.perf_counter() - begin)
    return median(times) or 0.0


def _wait(subject: Subject) -> None:
    if subject.device.type == "cuda":
        torch.cuda.synchronize(subject.device)


def _try_candidate(
    laboratory: Laboratory, candidate: Candidate, outcome: Outcome, losses: "_LossGate", say: Say
) -> None:
    """All alternatives of one candidate; the fastest that passes is kept."""
    records: list[tuple[TrialRecord, Change]] = []
    for proposal in _proposals(laboratory, candidate, outcome.changes):
        if isinstance(proposal, Rejected):
            outcome.trials.append(_refused(candidate, proposal.reason))
        elif time.monotonic() > laboratory.deadline:
            late = _refused(candidate, "no time left; raise max_seconds")
            outcome.trials.append(replace(late, what=proposal.reason, setting=dict(proposal.setting)))
        else:
            record = try_change(laboratory, outcome.changes, proposal)
            say(f"{candidate.name}: {proposal.reason}: {'passes' if record.kept else 'not kept'}, {record.reason}")
            records.append((record, proposal))
    chosen = False
    for record, proposal in sorted(records, key=_worth):
        if record.kept and chosen:
            record = replace(record, kept=False, reason="an alternative is better")
        elif record.kept and candidate.numerics is Numerics.PRECISION:
            record = losses.judged(record, [*outcome.changes, proposal])
            say(f"{candidate.name}: {proposal.reason}: {'kept' if record.kept else record.reason}")
        if record.kept:
            chosen = True
            outcome.changes.append(proposal)
        outcome.trials.append(record)
    if chosen and candidate.numerics is Numerics.PRECISION:
        _new_baseline(laboratory, outcome.changes)


def _worth(tried: tuple[TrialRecord, Change]) -> float:
    """The best first: the fastest, or the one that saves most."""
    record = tried[0]
    return -(record.gain or 0.0) if tried[1].saves_bytes is None else float(record.memory_bytes or 0)


def _proposals(laboratory: Laboratory, candidate: Candidate, kept: Sequence[Change]) -> Sequence[Change | Rejected]:
    """What a candidate proposes for the model with what was kept so far."""
    subject = laboratory.subject
    levels = _LEVELS[: _LEVELS.index(subject.config.level) + 1]
    verdict: Decision = registry.admitted(candidate, levels, subject.profile.supports)
    if isinstance(verdict, Rejected):
        return [verdict]
    try:
        with applied(subject, kept, laboratory.lookup), preserved(subject.model):
            return candidate.applies(subject)
    except Exception as error:  # noqa: BLE001  a candidate may fail in any way, and the run goes on
        return [
            Rejected(candidate.name, f"failed to look: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        ]


def _refused(candidate: Candidate, reason: str) -> TrialRecord:
    return TrialRecord(candidate=candidate.name, level=candidate.level.value, reason=reason)


def _new_baseline(laboratory: Laboratory, kept: Sequence[Change]) -> None:
    """Changes of precision were judged; what follows is compared with the model in its new precision."""
    eager = [change for change in kept if laboratory.lookup(change.candidate).stage is not Stage.COMPILE]
    with applied(laboratory.subject, eager, laboratory.lookup):
        _record(laboratory.subject, laboratory.work)
        laboratory.baseline = take_baseline(laboratory.subject, laboratory.work.loss_and_outputs)


class _LossGate:
    """The loss after a short run against the unchanged model's, which is run once."""

    def __init__(self, laboratory: Laboratory) -> None:
        self._laboratory = laboratory
        self._plain: tuple[float, list[float]] | None = None

    def judged(self, record: TrialRecord, changes: Sequence[Change]) -> TrialRecord:
        """The record, not kept where the loss is worse."""
        subject = self._laboratory.subject
        if not (room := room_for_weights(subject.model)):
            return replace(record, kept=False, reason=f"its loss cannot be tried: {room.reason}")
        if self._plain is None:
            self._plain = self._start(), self._losses([])
        start, plain = self._plain
        spreads = gate(Numerics.PRECISION, subject.compute_dtype).loss_spreads
        assert spreads is not None
        verdict = judge_losses(plain, self._losses(changes), start, spreads)
        gates = f"{record.gate}; {verdict.reason}"
        if verdict:
            return replace(record, gate=gates)
        return replace(record, kept=False, gate=gates, reason=f"trains worse: {verdict.reason}")

    def _start(self) -> float:
        with preserved(self._laboratory.subject.model):
            return float(self._laboratory.work.loss().detach())

    def _losses(self, changes: Sequence[Change]) -> list[float]:
        laboratory = self._laboratory

        def step(seed: int, number: int) -> torch.Tensor:
            if number == STEPS:
                return laboratory.work.loss()
            with resampled(laboratory.work, 1000 * seed + number):
                return laboratory.work.loss()

        with applied(laboratory.subject, changes, laboratory.lookup):
            return losses_after(laboratory.subject.model, step)


def _judge_whole(laboratory: Laboratory, plain: Baseline, outcome: Outcome, say: Say) -> None:
    """Measure all kept changes together; where they are not faster, the unchanged model is what trains."""
    if not outcome.changes:
        say("nothing is kept: the unchanged model trains")
        return
    subject = laboratory.subject
    numerics = [laboratory.lookup(change.candidate).numerics for change in outcome.changes]
    loosest = max(numerics, key=list(Numerics).index)
    stages = {laboratory.lookup(change.candidate).stage for change in outcome.changes}
    memory_only = all(change.saves_bytes is not None for change in outcome.changes)
    begin = time.monotonic()
    what = ", ".join(change.candidate for change in outcome.changes)
    record = TrialRecord(candidate="all kept changes", level=subject.config.level.value, what=what)
    try:
        verdict = compare(laboratory, outcome.changes, loosest, plain)
        with preserved(subject.model, weights=Stage.OPTIMIZER not in stages):
            if stages == {Stage.INPUT}:
                outcome.whole = replace(record, kept=True, reason="only data loading is changed", gate=verdict.reason)
                return
            gain = _measure_whole(laboratory, outcome.changes, Stage.OPTIMIZER in stages)
            if not judge_gain(gain)[0] and gain.ratio > 1.0:
                # Each part was surely faster by itself: noise is the likelier reason.
                gain = _measure_whole(laboratory, outcome.changes, Stage.OPTIMIZER in stages)
    except Exception as error:  # noqa: BLE001  together they may fail where each alone did not
        reason = f"failed together: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        _drop_all(outcome, replace(record, reason=reason), say)
        return
    record = replace(
        record, gain=gain.ratio, low=gain.expect_low, high=gain.expect_high, gate=verdict.reason,
        seconds=time.monotonic() - begin,
    )  # fmt: skip
    keep, reason = judge_gain(gain)
    if not verdict:
        _drop_all(outcome, replace(record, reason=f"together the numbers differ: {verdict.reason}"), say)
    elif not keep and not memory_only:
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
