"""The search: candidates in turn, each tried on top of what was kept; then the whole against the unchanged model."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.decision import Decision, Rejected
from kpt_lightning.errors import KptError
from kpt_lightning.measure.interleave import ROUNDS, SLOW_ROUNDS, SLOW_SECONDS, timed
from kpt_lightning.measure.statistics import median
from kpt_lightning.optimize.apply import applied
from kpt_lightning.optimize.arguments import check_search
from kpt_lightning.optimize.baseline import Baseline, take_baseline
from kpt_lightning.optimize.first_guess import RULES, try_together
from kpt_lightning.optimize.guarded import check_device, guarded, told
from kpt_lightning.optimize.laboratory import Laboratory, record_calls_of, train_once
from kpt_lightning.optimize.loss_gate import LossGate
from kpt_lightning.optimize.outcome import Outcome
from kpt_lightning.optimize.put_back import UnrestoredError, put_back
from kpt_lightning.optimize.surroundings import surroundings
from kpt_lightning.optimize.trial import try_change
from kpt_lightning.optimize.trial_record import TrialRecord
from kpt_lightning.optimize.whole import judge_whole
from kpt_lightning.optimize.work import Work
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.reading import read
from kpt_lightning.validation.state import preserved, surrounded_by

Say = Callable[[str], None]


def search(
    subject: Subject,
    work: Work,
    *,
    max_seconds: float,
    first: Callable[[], Sequence[Change]] = tuple,
    pool: Sequence[Candidate] | None = None,
    rounds: int | None = None,
    say: Say = lambda text: None,
) -> Outcome:
    """Try everything that the level allows and keep what measurably helps; the model is afterwards as before.

    Args:
        subject: The model and what surrounds it.
        work: Its forward pass on a real batch.
        max_seconds: No trial starts after that; one that runs is finished, for a compiler cannot be stopped.
        first: Gives changes that are tried together before all else, once the unchanged model has run; where they are
            kept, their candidates are not asked again.
        pool: Candidates to try; all that are known by default.
        rounds: Pairs of timings in a trial; by the length of a step if not given.
        say: Told what happens, one line at a time.

    Raises:
        ConfigError: ``max_seconds`` or the goal is none.
        KptError: The model does not train on this batch, or the device failed.
    """
    check_search(max_seconds, subject.goal)
    start = time.monotonic()
    candidates = tuple(registry.candidates() if pool is None else pool)
    with surrounded_by(*surroundings(subject, work)):
        outcome = _searched(subject, work, candidates, first, start + max_seconds, rounds, say)
    outcome.seconds = time.monotonic() - start
    return outcome


def _searched(
    subject: Subject, work: Work, candidates: Sequence[Candidate], first: Callable[[], Sequence[Change]],
    deadline: float, rounds: int | None, say: Say,
) -> Outcome:  # fmt: skip
    by_name = {each.name: each for each in candidates}
    plain = _first_look(subject, work)
    if rounds is None:
        rounds = SLOW_ROUNDS if (subject.step_seconds or 0.0) > SLOW_SECONDS else ROUNDS
    laboratory = Laboratory(subject, work, plain, by_name.__getitem__, deadline, rounds)
    say(f"unchanged: {subject.step_seconds or 0:.4f} s for one forward and backward pass")
    outcome = Outcome()
    losses = LossGate(laboratory)
    if time.monotonic() <= deadline:
        _try_first(laboratory, first(), outcome, losses, say)
    settled = {change.candidate for change in outcome.changes}
    for candidate in (each for each in candidates if each.name not in settled):
        _try_candidate(laboratory, candidate, outcome, losses, say)
    judge_whole(laboratory, plain, outcome, say)
    return outcome


def _try_first(
    laboratory: Laboratory, first: Sequence[Change], outcome: Outcome, losses: LossGate, say: Say
) -> None:  # fmt: skip
    """Keep all of the first guess, or nothing of it."""
    if not first:
        return
    guessed = try_together(laboratory, first, losses)
    say(f"{RULES}, {guessed.what}: {'kept' if guessed.kept else 'not kept'}, {guessed.reason}")
    outcome.trials.append(guessed)
    if guessed.kept:
        outcome.changes += first
        for change in first:
            told = _untried(laboratory.lookup(change.candidate), change, f"faster together, see {RULES}")
            outcome.trials.append(replace(told, kept=True))


def _first_look(subject: Subject, work: Work) -> Baseline:
    """Run the unchanged model; what fails here is the user's."""
    try:
        # As it is, before anything looks on: what the user compiles must not be compiled with an observer inside.
        read(subject.model, work.loss_and_outputs)
        record_calls_of(subject, work)
        baseline = take_baseline(subject, work.loss_and_outputs)
        subject.step_seconds = _seconds(subject, work)
    except KptError:
        raise
    except Exception as error:
        raise KptError(
            f"the unchanged model does not train on this batch, so nothing can be tried: {told(error)}. Make one "
            "forward and backward pass work first"
        ) from error
    return baseline


def _seconds(subject: Subject, work: Work) -> float:
    with preserved(subject.model):
        return median([timed(lambda: train_once(subject, work), subject.device) for _ in range(3)]) or 0.0


def _try_candidate(laboratory: Laboratory, candidate: Candidate, outcome: Outcome, losses: LossGate, say: Say) -> None:
    """All alternatives of one candidate; the fastest that passes is kept."""
    proposals = _proposals(laboratory, candidate, outcome.changes)
    changes = [each for each in proposals if isinstance(each, Change)]
    outcome.trials += [_refused(candidate, each.reason) for each in proposals if isinstance(each, Rejected)]
    kept = _best_of(laboratory, candidate, [each for each in changes if not each.fallback], outcome, losses, say)
    for each in (each for each in changes if each.fallback and kept):
        outcome.trials.append(_untried(candidate, each, "of use only where the others do not pass"))
    if not kept:
        kept = _best_of(laboratory, candidate, [each for each in changes if each.fallback], outcome, losses, say)
    if kept and candidate.numerics is Numerics.PRECISION:
        _follow(laboratory, outcome)


def _best_of(
    laboratory: Laboratory, candidate: Candidate, changes: Sequence[Change], outcome: Outcome, losses: LossGate,
    say: Say,
) -> bool:  # fmt: skip
    """Try alternatives; whether one is kept."""
    records: list[tuple[TrialRecord, Change]] = []
    for change in changes:
        if time.monotonic() > laboratory.deadline:
            record = _untried(candidate, change, "no time left; raise max_seconds")
            outcome.trials.append(replace(record, ended="no time"))
            continue
        record = try_change(laboratory, outcome.changes, change)
        say(f"{candidate.name}: {change.reason}: {'passes' if record.kept else 'not kept'}, {record.reason}")
        records.append((record, change))
    chosen = False
    for record, change in sorted(records, key=_worth):
        if record.kept and chosen:
            record = replace(record, kept=False, reason="an alternative is better")
        elif record.kept and candidate.numerics is Numerics.PRECISION:
            judge = functools.partial(losses.judged, record, [*outcome.changes, change])
            record = guarded(laboratory.subject, record, judge)
            say(f"{candidate.name}: {change.reason}: {'kept' if record.kept else record.reason}")
        if record.kept:
            chosen = True
            outcome.changes.append(change)
        outcome.trials.append(record)
    return chosen


def _untried(candidate: Candidate, change: Change, reason: str) -> TrialRecord:
    return replace(_refused(candidate, reason), what=change.reason, setting=dict(change.setting))


def _worth(tried: tuple[TrialRecord, Change]) -> float:
    """The best first: the fastest, or the one that saves most."""
    record = tried[0]
    return -(record.gain or 0.0) if tried[1].saves_bytes is None else float(record.memory_bytes or 0)


def _proposals(laboratory: Laboratory, candidate: Candidate, kept: Sequence[Change]) -> Sequence[Change | Rejected]:
    """What a candidate proposes for the model with what was kept so far."""
    subject = laboratory.subject
    verdict: Decision = registry.admitted(candidate, subject.config.level.and_below, subject.profile.supports)
    if isinstance(verdict, Rejected):
        return [verdict]
    try:
        with put_back(subject), applied(subject, kept, laboratory.lookup), preserved(subject.model):
            return candidate.applies(subject)
    except UnrestoredError:
        raise
    except Exception as error:  # noqa: BLE001  a candidate may fail in any way, and the run goes on
        check_device(subject.device)
        return [Rejected(candidate.name, f"failed to look: {told(error)}")]


def _refused(candidate: Candidate, reason: str) -> TrialRecord:
    return TrialRecord(candidate=candidate.name, level=candidate.level.value, reason=reason)


def _follow(laboratory: Laboratory, outcome: Outcome) -> None:
    """Compare what comes next with the model in its new precision; where that cannot be measured, drop the change."""
    number = max(at for at, trial in enumerate(outcome.trials) if trial.kept)
    record, calls = outcome.trials[number], laboratory.subject.calls

    def follow() -> TrialRecord:
        _new_baseline(laboratory, outcome.changes)
        return record

    outcome.trials[number] = guarded(laboratory.subject, record, follow)
    if not outcome.trials[number].kept:
        outcome.changes.pop()
        laboratory.subject.calls = calls


def _new_baseline(laboratory: Laboratory, kept: Sequence[Change]) -> None:
    """Changes of precision were judged; what follows is compared with the model in its new precision."""
    eager = laboratory.eager(kept)
    with applied(laboratory.subject, eager, laboratory.lookup):
        record_calls_of(laboratory.subject, laboratory.work)
    if laboratory.steady(kept[-1:]):
        with applied(laboratory.subject, laboratory.steady(eager), laboratory.lookup):
            laboratory.baseline = take_baseline(laboratory.subject, laboratory.work.loss_and_outputs)
