"""The newest runs of each key against those before them in the same environment: what a build asks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kpt_lightning.measure import statistics
from kpt_lightning.tracking.compare import environment_changes
from kpt_lightning.tracking.gate import Verdict, compare
from kpt_lightning.tracking.record import RunKey, RunRecord
from kpt_lightning.tracking.severity import DEFAULT_LIMITS, SeverityLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One metric of one key.

    Attributes:
        key: Of the runs.
        metric: Its name.
        unit: Of both levels.
        before: Median of the runs that were compared with; None where there are none.
        now: Median of the new runs.
        verdict: What they show; None where no run of the same environment came before.
        note: What a reader must know, such as an environment that changed; empty otherwise.
    """

    key: RunKey
    metric: str
    unit: str
    before: float | None
    now: float
    verdict: Verdict | None
    note: str = ""

    @property
    def judged(self) -> bool:
        """Whether there was enough to compare with."""
        return self.verdict is not None and self.verdict.interval.finite


def check_runs(
    records: Sequence[RunRecord], *, new: int = 1, metrics: Collection[str] | None = None,
    limits: SeverityLimits = DEFAULT_LIMITS,
) -> list[Checked]:  # fmt: skip
    """Judge the newest runs of each key, metric by metric.

    Only finished runs count. Runs in another environment than the newest one (anything but the commit) are left out and
    told: a change of torch or of a driver begins a new base.

    Args:
        records: A history, oldest first.
        new: How many runs of each key are the new ones.
        metrics: Names; all that the newest run has if not given.
        limits: Of the severities.

    Raises:
        ValueError: ``new`` is less than 1.
    """
    if new < 1:
        raise ValueError(f"new={new!r}: must be 1 or more, the number of runs to judge.")
    by_key: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.status == "finished":
            by_key.setdefault(record.key.digest, []).append(record)
    found = []
    for runs in by_key.values():
        older, newer = runs[:-new], runs[-new:]
        alike = [run for run in older if not environment_changes(run, newer[-1])]
        note = _what_changed(older, newer[-1]) if len(alike) < len(older) else ""
        names = newer[-1].metrics if metrics is None else [name for name in newer[-1].metrics if name in metrics]
        found += [_checked(alike, newer, name, note, limits) for name in names]
    return found


def _checked(
    older: Sequence[RunRecord], newer: Sequence[RunRecord], name: str, note: str, limits: SeverityLimits
) -> Checked:  # fmt: skip
    newest = newer[-1].metrics[name]
    before, now = _values(older, name), _values(newer, name)
    verdict = None
    if before:
        verdict = compare(before, now, higher_is_better=newest.better == "higher", limits=limits)
    level = statistics.median(now)
    assert level is not None
    return Checked(
        key=newer[-1].key, metric=name, unit=newest.unit, before=statistics.median(before), now=level,
        verdict=verdict, note=note,
    )  # fmt: skip


def _values(runs: Sequence[RunRecord], name: str) -> list[float]:
    return [run.metrics[name].median for run in runs if name in run.metrics]


def _what_changed(older: Sequence[RunRecord], newest: RunRecord) -> str:
    """The last change, in words."""
    found = next(changes for run in reversed(older) if (changes := environment_changes(run, newest)))
    text = ", ".join(f"{name} {then or 'none'} -> {now or 'none'}" for name, (then, now) in found.items())
    return f"only runs since the environment changed are compared with: {text}"
