"""A run and a comparison as short tables, for a terminal or as plain text."""

import io
import math
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from kpt_lightning.tracking.compare import Comparison, Row, noise_floor
from kpt_lightning.tracking.record import Metric, RunRecord

NOTHING_TO_COMPARE = "first run of this key: nothing to compare with"
COLORS = {"slower": "red", "worse": "red", "faster": "green", "better": "green"}
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
}
PLAIN_WIDTH = 120
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


def comparison_table(comparison: Comparison) -> Table:
    """The new run against its baseline: each judged metric with its change, the 95 % interval and the verdict."""
    notes = [f"changed: {n} {old} -> {new}" for n, (old, new) in comparison.environment_changes.items()]
    if notes:
        notes.append("the environment changed, which may be the cause")
    if comparison.commits:
        notes.append(f"commit {_short(comparison.commits[0])} -> {_short(comparison.commits[1])}")
    floor = noise_floor(comparison.baseline, "step_time") or 0.0
    source = f"{comparison.like_runs} like runs" if comparison.like_runs else f"a floor of {floor:.1%} per run in time"
    notes += [f"{row.metric}: {row.verdict}" for row in comparison.rows if ":" in row.verdict]
    notes += [*comparison.problems, f"noise between runs: {source}"]
    title = f"{_title(comparison.new)}\nagainst {comparison.baseline.run_id[:8]} of {comparison.baseline.created_at}"
    table = _table(title, notes)
    table.add_column("metric", no_wrap=True)
    for name in ("baseline", "now", "change", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in comparison.rows:
        unit = comparison.new.metrics[row.metric].unit
        verdict, color = row.verdict.partition(":")[0], COLORS.get(row.verdict)
        verdict = f"[{color}]{verdict}[/{color}]" if color else verdict
        values = show_value(row.baseline, unit), show_value(row.new, unit)
        table.add_row(LABELS.get(row.metric, row.metric), *values, _percent(row.change), _interval(row), verdict)
    return table


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


def _interval(row: Row) -> str:
    known = row.interval.finite and row.interval.high < UNREADABLE
    return f"{100 * row.interval.low:+.1f}..{row.interval.high:+.1%}" if known else "unknown"


def _percent(change: float) -> str:
    return f"{change:+.1%}" if abs(change) < UNREADABLE else f"x{change + 1:.3g}"


def _table(title: str, notes: Iterable[str]) -> Table:
    layout = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, caption="\n".join(notes) or None)
    layout.title_justify = layout.caption_justify = "left"
    return layout


def _short(commit: str | None) -> str:
    return commit[:10] if commit else "none"
