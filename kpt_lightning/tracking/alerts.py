"""One alert for metrics that fall together: a slower step also means fewer tokens per second."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kpt_lightning.tracking.acks import rank
from kpt_lightning.tracking.change_points import Change, detect_changes
from kpt_lightning.tracking.check import Checked, finished_by_key
from kpt_lightning.tracking.differences import environment_changes
from kpt_lightning.tracking.record import RunKey, RunRecord
from kpt_lightning.tracking.severity import Severity

TIME_ORDER = (
    "step_time", "tokens_per_second", "samples_per_second", "mfu", "data_wait", "first_step_time",
)  # fmt: skip
"""Metrics that a slower step moves, and which of two equally bad ones speaks for both: a cause before its effects."""

SAME_PLACE = 2
"""Runs apart that two change points of one cause may lie: a place is known to within as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Regressions of one key that have one cause as far as the metrics tell.

    Attributes:
        key: Of the runs.
        group: "time", "memory", "loss", or the name of a metric that stands alone.
        severity: The worst of those that are not acknowledged, else of all; None where all may be smaller than minor.
        leading: The metric that speaks for all.
        consequences: The others, worst first.
        since: First run at the worse level, where the history shows a lasting change; None otherwise.
        change: That change; its index counts the finished runs of the key in the same environment. None without it.
    """

    key: RunKey
    group: str
    severity: Severity | None
    leading: Checked
    consequences: tuple[Checked, ...] = ()
    since: RunRecord | None = None
    change: Change | None = None

    @property
    def acknowledged(self) -> bool:
        """Whether every regression in it is known and fails nothing."""
        return all(each.acknowledged is not None for each in (self.leading, *self.consequences))


def group_of(metric: str, unit: str) -> str:
    """The kind of metric that falls together with others of its kind."""
    if metric in TIME_ORDER or unit == "s" or unit.endswith("/s"):
        return "time"
    if unit == "bytes":
        return "memory"
    return "loss" if "loss" in metric else metric


def group_alerts(found: Sequence[Checked], records: Sequence[RunRecord] = ()) -> list[Alert]:
    """The regressions among ``found`` as alerts, the worst first, acknowledged ones last.

    Metrics of one key and group are one alert, unless the history shows that they changed at different times.

    Args:
        found: Of :func:`.check.check_runs`.
        records: The history, oldest first, to say since when; without it no alert says that.
    """
    groups: dict[tuple[str, str], list[Checked]] = {}
    for each in found:
        if each.regressed:
            groups.setdefault((each.key.digest, group_of(each.metric, each.unit)), []).append(each)
    by_key = finished_by_key(records)
    alerts = [
        alert
        for (digest, group), members in groups.items()
        for alert in _alerts(group, members, by_key.get(digest, []))
    ]
    return sorted(alerts, key=lambda alert: (alert.acknowledged, -rank(alert.severity)))


def _alerts(group: str, members: Sequence[Checked], runs: Sequence[RunRecord]) -> Iterator[Alert]:
    left = sorted(members, key=_weight)
    changes = {each.metric: _last_worsening(each, runs) for each in left}
    while left:
        leading = left[0]
        change = changes[leading.metric]
        together = [each for each in left if _same_place(change, changes[each.metric])]
        left = [each for each in left if each not in together]
        yield Alert(
            key=leading.key, group=group, severity=_severity(leading), leading=leading,
            consequences=tuple(together[1:]), change=change[0] if change else None, since=change[1] if change else None,
        )  # fmt: skip


def _weight(checked: Checked) -> tuple[bool, int, int]:
    """Sorts those that fail a build first, then by severity, then causes before effects."""
    place = TIME_ORDER.index(checked.metric) if checked.metric in TIME_ORDER else len(TIME_ORDER)
    return checked.acknowledged is not None, -rank(_severity(checked)), place


def _severity(checked: Checked) -> Severity | None:
    return checked.verdict.severity if checked.verdict else None


def _same_place(one: tuple[Change, RunRecord] | None, other: tuple[Change, RunRecord] | None) -> bool:
    return one is None or other is None or abs(one[0].index - other[0].index) <= SAME_PLACE


def _last_worsening(checked: Checked, runs: Sequence[RunRecord]) -> tuple[Change, RunRecord] | None:
    """The last change of the metric, where it was for the worse, and the first run after it."""
    newest = next((run for run in reversed(runs) if run.run_id in checked.new_runs), None)
    if newest is None:
        return None
    metric = newest.metrics.get(checked.metric)
    if metric is None:
        return None
    alike = [
        run
        for run in runs
        if not environment_changes(run, newest)
        and checked.metric in run.metrics
        and run.metrics[checked.metric].unit == metric.unit
    ]
    higher = metric.better == "higher"
    changes = detect_changes([run.metrics[checked.metric].median for run in alike], higher_is_better=higher)
    if not changes or (changes[-1].shift > 0.0) == higher:
        return None
    return changes[-1], alike[changes[-1].index]
