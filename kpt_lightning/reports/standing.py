"""How a metric stands now, in words: the same in the overview and above its chart."""

from dataclasses import dataclass, replace

from kpt_lightning.reports.elements import Element, element
from kpt_lightning.reports.histories import KeyHistory, MetricHistory, Step
from kpt_lightning.reports.numbers import counted, moment, percent, percent_range
from kpt_lightning.tracking.check import Checked
from kpt_lightning.tracking.severity import Severity

LABELS = {
    "step_time": "Step time", "data_wait": "Data wait", "tokens_per_second": "Throughput",
    "samples_per_second": "Throughput", "mfu": "MFU", "peak_memory": "Peak memory",
    "reserved_memory": "Reserved memory", "first_step_time": "First step", "final_loss": "Final loss",
}  # fmt: skip

SIGNS = {
    "severe": "✖", "moderate": "▲", "minor": "△", "regression": "△", "improvement": "★", "pass": "✓",
    "inconclusive": "?", "none": "\u2013",
}  # fmt: skip
"""Beside the word and the colour."""

REGRESSIONS = ("severe", "moderate", "minor", "regression")


@dataclass(frozen=True, slots=True)
class Standing:
    """What is said of a metric.

    Attributes:
        kind: A key of :data:`SIGNS`.
        verdict: In words.
        change: Relative, in words; empty where there is none.
        interval: Of the change.
        against: What was compared.
    """

    kind: str
    verdict: str
    change: str = ""
    interval: str = ""
    against: str = ""

    def badge(self) -> Element:
        """Sign and word."""
        sign = element("span", f"{SIGNS[self.kind]} ", aria_hidden="true")
        return element("span", sign, self.verdict, class_=f"badge {self.kind}")

    def figures(self) -> list[Element]:
        """Change, interval and what was compared, one below the other."""
        return [
            element("span", text, class_=name)
            for name, text in (("figure", self.change), ("muted", self.interval), ("muted", self.against))
            if text
        ]


def label(metric: str) -> str:
    """Name of a metric for a person; a user's own is left as it is."""
    return LABELS.get(metric, metric)


def name_of(severity: Severity | None) -> str:
    """A lasting change in words."""
    if severity is None:
        return "change of level, its loss too small or uncertain to name"
    return severity if severity == "improvement" else f"{severity} regression"


def standing(history: KeyHistory, metric: MetricHistory) -> Standing:
    """The last lasting change where it still stands, else the newest run against those before."""
    step = metric.standing_step
    found = _of_newest(metric.checked) if step is None else _of_step(history, metric, step)
    if metric.acknowledged is None or found.kind not in REGRESSIONS:
        return found
    return replace(found, kind="none", verdict=f"{found.verdict}, acknowledged")


def _of_step(history: KeyHistory, metric: MetricHistory, step: Step) -> Standing:
    severity, interval = step.change.severity, step.change.interval
    later = sum(value is not None for value in metric.values[step.after :])
    return Standing(
        severity or "inconclusive", name_of(severity), percent(step.change.shift),
        percent_range(interval.low, interval.high),
        f"for {counted(later, 'run')}, since {moment(history.runs[step.after].created_at)}",
    )  # fmt: skip


def _of_newest(checked: Checked | None) -> Standing:
    verdict = checked.verdict if checked is not None else None
    if checked is None or verdict is None:
        return Standing("none", "nothing to compare with")
    kind, words = str(verdict.outcome), str(verdict.outcome)
    if verdict.outcome == "inconclusive":
        needed = f"; about {counted(verdict.runs_needed, 'more run')} would tell" if verdict.runs_needed else ""
        words = f"inconclusive: {verdict.reason}{needed}"
    elif verdict.outcome == "regression" and verdict.severity is not None:
        kind, words = verdict.severity, name_of(verdict.severity)
    if not checked.judged:
        return Standing(kind, words)
    against = f"newest finished run against {verdict.baseline_runs} before"
    interval = verdict.interval
    return Standing(kind, words, percent(verdict.shift), percent_range(interval.low, interval.high), against)
