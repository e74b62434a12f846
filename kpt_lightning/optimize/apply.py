"""Applying a set of changes to a model, in the one order that works, and undoing all of them."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Candidate, Change, Stage
from kpt_lightning.candidates.subject import Subject

Lookup = Callable[[str], Candidate]


@contextmanager
def applied(subject: Subject, changes: Sequence[Change], lookup: Lookup = registry.candidate) -> Iterator[None]:
    """Apply ``changes`` by stage while the context is entered.

    Args:
        subject: Its model is changed in place, and is afterwards as before, also after an error half-way.
        changes: At most one of each candidate.
        lookup: Name to candidate.

    Raises:
        ConfigError: A change does not fit this model, or names a candidate that is not known here.
    """
    ordered = sorted(changes, key=lambda change: _place(lookup(change.candidate)))
    outer = subject.key, list(subject.applied)
    with ExitStack() as undo:
        undo.callback(_restore, subject, outer)
        subject.key = key_of([change for change in ordered if lookup(change.candidate).stage < Stage.COMPILE])
        for change in ordered:
            candidate = lookup(change.candidate)
            undo.callback(candidate.undo, subject, candidate.apply(subject, change.setting))
            subject.applied.append(change.candidate)
        yield


def split_by_need(changes: Sequence[Change]) -> tuple[list[Change], list[Change]]:
    """What can be done to a model alone, and what waits for optimizer or loader."""
    later = (Stage.OPTIMIZER, Stage.INPUT)
    waiting = [change for change in changes if registry.candidate(change.candidate).stage in later]
    return [change for change in changes if change not in waiting], waiting


def key_of(changes: Sequence[Change]) -> str:
    """Equal for equal sets of changes."""
    parts = [(change.candidate, change.setting) for change in changes]
    return json.dumps(parts, sort_keys=True, default=str) if parts else ""


def _place(candidate: Candidate) -> tuple[int, int, str]:
    return (candidate.stage, candidate.turn, candidate.name)


def _restore(subject: Subject, outer: tuple[str, list[str]]) -> None:
    subject.key, subject.applied[:] = outer
