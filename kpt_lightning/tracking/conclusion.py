"""What a run that just ended shows beside its history: the gate's verdicts, and what no number tells."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from kpt_lightning.errors import KptError
from kpt_lightning.measure import statistics
from kpt_lightning.tracking.acks import SEVERITIES, Ack, rank
from kpt_lightning.tracking.alerts import Alert, group_alerts
from kpt_lightning.tracking.broken import broken_runs
from kpt_lightning.tracking.check import Checked, check_runs
from kpt_lightning.tracking.differences import differences
from kpt_lightning.tracking.events import utc_now
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.severity import DEFAULT_LIMITS, Severity, SeverityLimits

STEPS_NEEDED = statistics.values_needed()
"""Steady steps from which on the median of a run stands for it."""


class RegressionError(KptError, RuntimeError):
    """A run is worse than its history beyond the noise."""


class RegressionWarning(UserWarning):
    """A run is worse than its history beyond the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """One run and its history.

    Attributes:
        record: The run.
        earlier: Finished runs of the same key before it, in whatever environment.
        verdicts: One for each metric of the run, see :class:`.check.Checked`.
        alerts: Its regressions, those of one cause together, the worst first.
        problems: Severe findings that no metric shows: a loss that is not finite any more, an end without memory.
        fail_on: Least severity that counts as a regression.
        changes: What differs from the run before, see :func:`.differences.differences`.
    """

    record: RunRecord
    earlier: int
    verdicts: tuple[Checked, ...] = ()
    alerts: tuple[Alert, ...] = ()
    problems: tuple[str, ...] = ()
    fail_on: Severity = "minor"
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def regressions(self) -> tuple[str, ...]:
        """What got worse by ``fail_on`` or more and is not acknowledged, one clause each; empty where nothing did."""
        counted = [alert for alert in self.alerts if not alert.acknowledged and _reaches(alert.severity, self.fail_on)]
        return (*self.problems, *map(_clause, counted))

    @property
    def regressed(self) -> bool:
        """Whether anything did."""
        return bool(self.regressions)

    @property
    def severity(self) -> Severity | None:
        """Of the worst that is not acknowledged; None where nothing is known to be worse."""
        if self.problems:
            return "severe"
        return max((alert.severity for alert in self.alerts if not alert.acknowledged), key=rank, default=None)


def conclude(
    record: RunRecord, history: Sequence[RunRecord], *, acks: Sequence[Ack] = (), fail_on: Severity = "minor",
    limits: SeverityLimits = DEFAULT_LIMITS, accepted: Collection[str] = (),
) -> Conclusion | None:  # fmt: skip
    """Judge a run by the finished runs of its key, as ``kpt regress check`` does: a loss stands until it is over.

    Runs with fewer than six steady steps are neither judged nor compared with.

    Args:
        record: The run, finished or failed.
        history: Runs of the same key, oldest first, without this one.
        acks: Acknowledgements of known regressions.
        fail_on: Least severity that counts.
        limits: Of the severities.
        accepted: Ids of runs that somebody accepted, see :func:`.baselines.accepted_runs`.

    Returns:
        None where no run came before.
    """
    before = [run for run in history if run.status == "finished"]
    if not before:
        return None
    long = [run for run in before if _steps(run) >= STEPS_NEEDED]
    found: list[Checked] = []
    if record.status == "finished" and _steps(record) >= STEPS_NEEDED:
        judged = check_runs([*long, record], limits=limits, acks=acks, accepted=accepted)
        found = [each for each in judged if not each.missing]
    return Conclusion(
        record=record, earlier=len(before), verdicts=tuple(found), fail_on=fail_on,
        alerts=tuple(group_alerts(found, [*long, record])), problems=_problems(record, before, acks),
        changes=differences(before[-1], record),
    )  # fmt: skip


def _steps(run: RunRecord) -> int:
    """Steady steps; of a run from another tool, which has none, enough."""
    return run.metrics["step_time"].n if "first_step" in run.details and "step_time" in run.metrics else STEPS_NEEDED


def _problems(record: RunRecord, before: Sequence[RunRecord], acks: Sequence[Ack]) -> tuple[str, ...]:
    found = broken_runs([*before, record], now=utc_now(), acks=acks)
    new = [each for each in found if each.regressed and each.acknowledged is None]
    return tuple(f"{each.verdict.severity}: {each.verdict.reason}" for each in new if each.verdict is not None)


def _reaches(severity: Severity | None, least: Severity) -> bool:
    return rank(severity) >= SEVERITIES.index(least)


def _clause(alert: Alert) -> str:
    leading = alert.leading
    assert leading.verdict is not None
    bounds = leading.verdict.interval
    clause = f"{alert.severity}: {leading.metric} {_shift(leading):+.1%} ({bounds.low:+.1%} to {bounds.high:+.1%})"
    others = [f"{each.metric} {_shift(each):+.1%}" for each in alert.consequences]
    return f"{clause}, and with it {', '.join(others)}" if others else clause


def _shift(checked: Checked) -> float:
    return checked.verdict.shift if checked.verdict else 0.0
