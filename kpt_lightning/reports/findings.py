"""What a check found, in words. Every format, from the terminal to a pull request, takes its text from here."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kpt_lightning.reports.words import level, percent, visible
from kpt_lightning.tracking.acks import SEVERITIES, rank
from kpt_lightning.tracking.alerts import Alert
from kpt_lightning.tracking.check import Checked
from kpt_lightning.tracking.fingerprint import CODE_KEY
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.report import LABELS
from kpt_lightning.tracking.review import Review
from kpt_lightning.tracking.severity import Severity

State = Literal["failing", "tolerated", "acknowledged", "improved", "unsettled", "passed"]

STATES: tuple[State, ...] = ("failing", "tolerated", "acknowledged", "improved", "unsettled", "passed")
"""What a reader must see first comes first."""

COUNTED: dict[State, str] = {
    "tolerated": "worse by less than fails", "acknowledged": "known to be worse", "improved": "better",
    "unsettled": "inconclusive",
}  # fmt: skip
"""States that the headline of a passing check counts."""


SHORT_ID = 8
"""Characters of a run's id that are shown: ``kpt regress compare`` takes as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One metric of one key, in words without control characters.

    Attributes:
        checked: The data.
        state: "failing" for a regression of the severity that fails a build, "tolerated" for a lesser one,
            "acknowledged" for a known one, "unsettled" where nothing could be said.
        title: What ran where.
        name: Of the runs.
        metric: Label of the metric.
        before: Level of the runs that were compared with; empty where there are none.
        now: Level of the new runs; empty where the newest one lacks the metric.
        change: Shift; empty where its interval is unknown.
        interval: Of the change, at 95 %.
        verdict: Two or three words.
        headline: One clause: what changed, by how much.
        since: The first run at the new level; empty where nothing changed.
        compared: What it was compared with; empty where there is nothing.
        reasons: Clauses that tell why, and what to know of the comparison.
        consequences: Headlines of the metrics that fell together with this one.
        leading: Label of the metric that this one fell together with; empty where it speaks for itself.
    """

    checked: Checked
    state: State
    title: str
    name: str
    metric: str
    before: str
    now: str
    change: str
    interval: str
    verdict: str
    headline: str
    since: str
    compared: str
    reasons: tuple[str, ...]
    consequences: tuple[str, ...] = ()
    leading: str = ""

    @property
    def lines(self) -> tuple[str, ...]:
        """Everything that there is to say, one statement a line."""
        known = (("before", self.before), ("now", self.now))
        levels = ", ".join(f"{word} {value}" for word, value in known if value)
        together = f"together with {', '.join(self.consequences)}" if self.consequences else ""
        led = f"together with {self.leading}, which speaks for both" if self.leading else ""
        key = f"key {self.checked.key.digest}"
        head = f"{self.headline}: {self.verdict}"
        return tuple(filter(None, (head, levels, self.since, self.compared, together, led, *self.reasons, key)))


def describe(review: Review, fail_on: Severity) -> list[Finding]:
    """Put a review into words: alerts first, the worst first, each before its consequences.

    Args:
        review: Of :func:`kpt_lightning.tracking.review.review`.
        fail_on: Least severity that fails a build.
    """
    runs = {run.run_id: run for run in review.records}
    grouped = [(each, alert) for alert in review.alerts for each in (alert.leading, *alert.consequences)]
    known = {id(each) for each, _ in grouped}
    led = [_finding(each, alert, runs, fail_on) for each, alert in grouped]
    alone = [_finding(each, None, runs, fail_on) for each in review.found if id(each) not in known]
    return led + sorted(alone, key=lambda each: STATES.index(each.state))


def summary(found: Sequence[Finding]) -> str:
    """One sentence: the worst that was found, else how much was looked at."""
    if not found:
        return "No finished run in this history"
    failing = [each for each in found if each.state == "failing" and not each.leading]
    if failing:
        worst, others = failing[0], len(failing) - 1
        more = f", and {others} more regression{'s' * (others > 1)}" if others else ""
        where = f" in {worst.name}" + (f", {worst.since}" if worst.since else "")
        return f"{worst.verdict.capitalize()}: {worst.headline}{where}{more}"
    if not any(each.checked.judged for each in found):
        return f"Nothing could be judged: {'; '.join(found[0].reasons)}"
    parts = [f"{len(found)} metric{'s' * (len(found) > 1)}"]
    missing = sum(each.checked.missing for each in found)
    for state, words in COUNTED.items():
        count = sum(each.state == state and not each.checked.missing for each in found)
        parts += [f"{count} {words}"] if count else []
    parts += [f"{missing} missing in the newest run"] if missing else []
    return f"No regression that fails the build: {', '.join(parts)}"


def to_data(finding: Finding) -> dict[str, Any]:
    """The finding as JSON-like data: names and numbers as they are stored, and the words."""
    checked, verdict = finding.checked, finding.checked.verdict
    known = verdict if verdict is not None and checked.judged else None
    return {
        "name": checked.key.name, "key": checked.key.digest, "metric": checked.metric, "unit": checked.unit,
        "before": checked.before, "now": checked.now, "note": checked.note, "baseline": checked.baseline,
        "outcome": _outcome(checked), "since": checked.since,
        "severity": verdict and verdict.severity, "reason": finding.reasons[0],
        "shift": known and known.shift, "interval": known and [known.interval.low, known.interval.high],
        "runs_needed": verdict and verdict.runs_needed, "baseline_runs": verdict.baseline_runs if verdict else 0,
        "new_runs": list(checked.new_runs), "state": finding.state, "leading": finding.leading,
        "acknowledged": checked.acknowledged and asdict(checked.acknowledged), "text": list(finding.lines),
    }  # fmt: skip


def _finding(checked: Checked, alert: Alert | None, runs: Mapping[str, RunRecord], fail_on: Severity) -> Finding:
    key, state = checked.key, _state(checked, fail_on)
    name = visible(key.name)
    leads = alert is not None and alert.leading is checked
    others = alert.consequences if alert is not None and leads else ()
    return Finding(
        checked=checked, state=state, name=name, metric=_label(checked),
        title=f"{name}: {key.device_count} x {visible(key.device)}, {visible(key.strategy)}, {visible(key.precision)}",
        before="" if checked.before is None else level(checked.before, checked.unit),
        now="" if checked.now is None else level(checked.now, checked.unit), change=_change(checked),
        interval=_interval(checked), verdict=_verdict(checked), headline=_headline(checked),
        compared=_compared(checked, runs), since=_since(checked, alert, runs) if _has_changed(checked) else "",
        reasons=_reasons(checked), consequences=tuple(_headline(each) for each in others),
        leading="" if alert is None or leads else _label(alert.leading),
    )  # fmt: skip


def _state(checked: Checked, fail_on: Severity) -> State:
    if checked.verdict is None or checked.verdict.outcome == "inconclusive":
        return "unsettled"
    if checked.regressed:
        if checked.acknowledged is not None:
            return "acknowledged"
        return "failing" if rank(checked.verdict.severity) >= SEVERITIES.index(fail_on) else "tolerated"
    return "improved" if checked.verdict.outcome == "improvement" else "passed"


def _label(checked: Checked) -> str:
    return visible(LABELS.get(checked.metric, checked.metric))


def _headline(checked: Checked) -> str:
    change = _change(checked)
    return f"{_label(checked)} {change} (95% interval {_interval(checked)})" if change else _label(checked)


def _change(checked: Checked) -> str:
    return percent(checked.verdict.shift) if checked.verdict is not None and checked.judged else ""


def _interval(checked: Checked) -> str:
    if checked.verdict is None or not checked.judged:
        return ""
    return f"{percent(checked.verdict.interval.low)} to {percent(checked.verdict.interval.high)}"


def _outcome(checked: Checked) -> str:
    if checked.verdict is None:
        return "missing" if checked.missing else "no baseline"
    return checked.verdict.outcome


def _verdict(checked: Checked) -> str:
    if checked.verdict is None:
        return _outcome(checked)
    known = "acknowledged" if checked.acknowledged is not None else None
    severity = checked.verdict.severity if checked.regressed else None
    return " ".join(filter(None, (known, severity, checked.verdict.outcome)))


def _reasons(checked: Checked) -> tuple[str, ...]:
    ack = checked.acknowledged
    known = ack and f"acknowledged by {ack.author} until {ack.expires_at[:16]} UTC: {ack.reason}"
    over = checked.ended and f"the acknowledgement ({checked.ended[0].reason}) ended: {checked.ended[1].kind}"
    why = "no run to compare with" if checked.verdict is None else checked.verdict.reason
    until = "judged by the runs before that one until it is fixed, accepted or acknowledged"
    # Of what changed, ``since`` tells the run.
    place = "" if _has_changed(checked) else f"a loss stands since run {checked.since[:SHORT_ID]}; "
    stands = checked.since and f"{place}{until}"
    if checked.missing:
        return (visible(checked.note),)
    return tuple(visible(each) for each in (why, known, over, stands, checked.note) if each)


def _has_changed(checked: Checked) -> bool:
    return checked.verdict is not None and checked.verdict.outcome in ("regression", "improvement")


def _since(checked: Checked, alert: Alert | None, runs: Mapping[str, RunRecord]) -> str:
    """The first run of the loss that stands or of the lasting change, else the first one that was judged."""
    first = runs.get(checked.since)
    if first is None:
        first = alert.since if alert is not None and alert.since is not None else runs.get(checked.new_runs[0])
    return "" if first is None else f"since {_named(first)}"


def _compared(checked: Checked, runs: Mapping[str, RunRecord]) -> str:
    count = len(checked.base_runs)
    if not count or checked.base_runs[-1] not in runs:
        return ""
    pinned = f", pinned as {visible(checked.baseline)!r}" if checked.baseline else ""
    return f"compared with {count} run{'s' * (count > 1)} up to {_named(runs[checked.base_runs[-1]])}{pinned}"


def _named(run: RunRecord) -> str:
    commit = run.environment.get(CODE_KEY)
    return f"run {visible(run.run_id[:SHORT_ID])}" + (f" of commit {visible(commit[:10])}" if commit else "")
