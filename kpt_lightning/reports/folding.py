"""Findings for the eye: those that need no look folded into one entry, and what is common to a key told once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kpt_lightning.reports.findings import Finding

T = TypeVar("T")

FOLDED = ("passed", "unsettled")
"""States of which a reader wants the number: metrics of these are folded where nothing was lost or could be judged."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Several metrics of one key of which the same is to be said.

    Attributes:
        name: Of the runs.
        verdict: Of each of them.
        reason: Of that verdict.
        metrics: Their labels.
    """

    name: str
    verdict: str
    reason: str
    metrics: tuple[str, ...]

    @property
    def text(self) -> str:
        """One line."""
        return f"{len(self.metrics)} {self.verdict} ({self.reason}): {', '.join(self.metrics)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFindings:
    """What was found of one key.

    Attributes:
        title: What ran where.
        digest: Of the key.
        shown: A row each, in order.
        folds: One line each.
        notes: Everything else that there is to know, each once.
    """

    title: str
    digest: str
    shown: tuple[Finding, ...]
    folds: tuple[Fold, ...]
    notes: tuple[str, ...]


def by_key(found: Sequence[Finding], *, fold: bool = True) -> list[KeyFindings]:
    """Findings key by key, the worst key first.

    Args:
        found: Of :func:`.findings.describe`.
        fold: Whether metrics that need no look share a line.
    """
    keys = _grouped(found, lambda each: each.checked.key.digest)
    return [_of_key(digest, findings, fold) for digest, findings in keys.items()]


def folded(found: Sequence[Finding], *, fold: bool = True) -> tuple[list[Finding], list[Fold]]:
    """Those with a row of their own, in order, and the rest; one alone is never folded."""
    groups = _grouped([each for each in found if fold and _may_fold(each)], _likeness)
    several = {name: group for name, group in groups.items() if len(group) > 1}
    shown = [each for each in found if not (fold and _may_fold(each) and _likeness(each) in several)]
    return shown, [_fold(group) for group in several.values()]


def _of_key(digest: str, found: Sequence[Finding], fold: bool) -> KeyFindings:
    shown, folds = folded(found, fold=fold)
    alone = {id(each) for each in shown}
    notes: dict[str, list[Finding]] = {}
    for each in found:
        # A fold says the reason of its metrics itself.
        for note in filter(None, (each.since, *each.reasons[0 if id(each) in alone else 1 :])):
            notes.setdefault(note, []).append(each)
    return KeyFindings(
        title=found[0].title, digest=digest, shown=tuple(shown), folds=tuple(folds), notes=tuple(_merged(notes, found))
    )


def _merged(notes: dict[str, list[Finding]], found: Sequence[Finding]) -> Iterator[str]:
    """Notes of the same metrics in one line, which names them unless it holds for all that were measured."""
    measured = sum(not each.checked.missing for each in found)
    lines: dict[tuple[str, ...], list[str]] = {}
    for note, about in notes.items():
        every = len(about) == measured > 1 and not any(each.checked.missing for each in about)
        lines.setdefault(() if every else tuple(each.metric for each in about), []).append(note)
    for names, said in lines.items():
        yield f"{', '.join(names)}: {'; '.join(said)}" if names else "; ".join(said)


def _may_fold(finding: Finding) -> bool:
    checked = finding.checked
    return finding.state in FOLDED and not checked.missing and (finding.state == "passed" or not checked.judged)


def _likeness(finding: Finding) -> tuple[str, str, str]:
    return finding.checked.key.digest, finding.verdict, finding.reasons[0]


def _fold(group: Sequence[Finding]) -> Fold:
    first = group[0]
    return Fold(first.name, first.verdict, first.reasons[0], tuple(each.metric for each in group))


def _grouped(found: Sequence[Finding], name_of: Callable[[Finding], T]) -> dict[T, list[Finding]]:
    groups: dict[T, list[Finding]] = {}
    for each in found:
        groups.setdefault(name_of(each), []).append(each)
    return groups
