"""A run, alone and beside its history, as short tables, for a terminal or as plain text."""

import io
import math
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from kpt_lightning.tracking.check import Checked
from kpt_lightning.tracking.conclusion import Conclusion
from kpt_lightning.tracking.fingerprint import CODE_KEY
from kpt_lightning.tracking.record import Metric, RunRecord
from kpt_lightning.tracking.thresholds import GATE_FEWEST_RUNS

NOTHING_TO_COMPARE = "first run of this key: nothing to compare with"
COLORS = {"regression": "red", "improvement": "green"}
SHOWN_CHANGES = ("key", "config", "plan", f"environment.{CODE_KEY}")
"""Beginnings of the names of changes that a table tells; the verdicts tell those of the environment."""

LABELS = {
    "step_time": "step time",
    "data_wait": "data wait",
    "tokens_per_second": "tokens/s",
    "samples_per_second": "samples/s",
    "mfu": "MFU",
    "peak_memory": "peak memory",
    "reserved_memory": "reserved",
    "first_step_time": "first step",
    "final_loss": "final loss",
    "compile_time": "compilation",
    "compiled_graphs": "graphs compiled",
    "recompiles": "recompilations",
    "checkpoint_stall": "checkpoint stall",
}
PLAIN_WIDTH = 120
SHORT = 12
UNREADABLE = 9.0


def record_table(record: RunRecord) -> Table:
    """One run: each metric with its median, spread and number of steps."""
    table = _table(_title(record), record.notes)
    table.add_column("metric", no_wrap=True)
    for name in ("median", "spread", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, metric in record.metrics.items():
        spread = "" if metric.spread is None else f"{metric.spread:.1%}"
        table.add_row(LABELS.get(name, name), show_value(metric.median, metric.unit), spread, str(metric.n))
    return table


def conclusion_table(conclusion: Conclusion) -> Table:
    """The run beside its history: each judged metric with its change, the 95 % interval and the verdict."""
    title = f"{_title(conclusion.record)}\nagainst the {_runs(conclusion.earlier)} of this key before"
    table = _table(title, (*_remarks(conclusion), *conclusion.record.notes))
    table.add_column("metric", no_wrap=True)
    for name in ("before", "now", "change", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for each in conclusion.verdicts:
        before = "" if each.before is None else show_value(each.before, each.unit)
        outcome = each.verdict.outcome if each.verdict else ""
        color = COLORS.get(outcome)
        verdict = f"[{color}]{_verdict(each)}[/{color}]" if color else _verdict(each)
        now = "" if each.now is None else show_value(each.now, each.unit)
        values = before, now, _change(each), _interval(each)
        table.add_row(LABELS.get(each.metric, each.metric), *values, verdict)
    return table


def _remarks(conclusion: Conclusion) -> Iterable[str]:
    """What the rows leave open: why nothing was judged, how many runs more would settle it, what changed."""
    steps = conclusion.record.metrics.get("step_time")
    if not conclusion.verdicts and conclusion.record.status == "finished":
        yield f"{steps.n if steps else 0} steady steps: too few to compare"
    # A run beside others of its history has the same reason in most rows.
    reasons: dict[str, list[str]] = {}
    for each in conclusion.verdicts:
        for reason in filter(None, (_open_question(each), each.note)):
            reasons.setdefault(reason, []).append(LABELS.get(each.metric, each.metric))
    for reason, names in reasons.items():
        all_of_them = len(names) == len(conclusion.verdicts)
        yield reason if all_of_them else f"{', '.join(names)}: {reason}"
    for name, (then, now) in conclusion.changes.items():
        if name.startswith(SHOWN_CHANGES):
            yield f"changed: {name} {_short(then)} -> {_short(now)}"
    yield from conclusion.problems


def _open_question(checked: Checked) -> str:
    """Why there is no verdict, and what would make one; empty where there is one."""
    verdict = checked.verdict
    if verdict is None:
        return "no run before in this environment"
    if not checked.judged and verdict.baseline_runs < GATE_FEWEST_RUNS:
        missing = GATE_FEWEST_RUNS - verdict.baseline_runs
        return f"{_runs(verdict.baseline_runs)} before: too few to judge; about {missing} more needed"
    return verdict.reason if verdict.outcome == "inconclusive" else ""


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def as_text(table: Table) -> str:
    """A table as plain text without colours."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def show_value(value: float, unit: str) -> str:
    """A number with its unit, for a person."""
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if unit == "s":
        return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.3f} ms"
    if unit == "1":
        return f"{value:.4g}"
    return f"{value:,.0f}/s" if value >= 100 else f"{value:.3g}/s"


def log_values(record: RunRecord) -> dict[str, float]:
    """Metrics as a logger takes them: ``kpt/<name>`` to the median."""
    return {f"kpt/{name}": metric.median for name, metric in record.metrics.items() if _is_finite(metric)}


def _is_finite(metric: Metric) -> bool:
    return math.isfinite(metric.median)


def _title(record: RunRecord) -> str:
    key = record.key
    return f"{key.name}: {key.device_count} x {key.device}, {key.strategy}, {key.precision}"


def _verdict(checked: Checked) -> str:
    verdict = checked.verdict
    if verdict is None:
        return "no baseline"
    if not checked.judged and verdict.baseline_runs < GATE_FEWEST_RUNS:
        return "too few runs"
    if verdict.outcome != "regression":
        return verdict.outcome
    known = "known " if checked.acknowledged is not None else ""
    return f"{known}{verdict.severity or 'tiny'} regression"


def _interval(checked: Checked) -> str:
    bounds = checked.verdict.interval if checked.verdict else None
    known = bounds is not None and bounds.finite and abs(bounds.high) < UNREADABLE
    return f"{100 * bounds.low:+.1f}..{bounds.high:+.1%}" if known and bounds else "unknown"


def _change(checked: Checked) -> str:
    if checked.verdict is None or not math.isfinite(checked.verdict.shift):
        return ""
    change = checked.verdict.shift
    return f"{change:+.1%}" if abs(change) < UNREADABLE else f"x{change + 1:.3g}"


def _table(title: str, notes: Iterable[str]) -> Table:
    layout = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, caption="\n".join(notes) or None)
    layout.title_justify = layout.caption_justify = "left"
    return layout


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= SHORT else f"{text[: SHORT - 2]}.."
