"""The small charts: the spread of steps within runs, and the line of the overview."""

import math

from kpt_lightning.measure import statistics
from kpt_lightning.reports.elements import Element, element
from kpt_lightning.reports.histories import KeyHistory, MetricHistory
from kpt_lightning.reports.numbers import SPACE, Scale, counted
from kpt_lightning.reports.plot import LARGEST, Frame, dates, describe, drawing
from kpt_lightning.tracking.record import Metric, RunRecord

FOOT, SPREAD_TOP, SPREAD_HEIGHT = 20, 30, 140
"""Pixels: room for the dates, above the bars, and the whole."""

SPREAD_RUNS = 30
"""The newest runs whose spread of steps is shown."""

BAR_SHARE, WIDEST = 0.6, 0.04
"""Width of a bar over its distance to the next, and at most over the whole chart: two runs are no two walls."""

PERCENT = Scale(0.01, "%", 2)

SPARK_WIDTH, SPARK_HEIGHT, SPARK_POINTS = 120, 28, 60

SPARK_LEAST = 0.03
"""At least this share of the median is shown above and below it, so that noise does not look like a change."""


def spread_chart(history: KeyHistory, metric: MetricHistory) -> Element | None:
    """How far from their median half of a run's steps reach, in the newest runs; None where none kept its spread.

    The record keeps median and median absolute deviation, which is just that distance.
    """
    found = [(run, run.metrics[metric.name]) for run in history.runs if _has_spread(run, metric)][-SPREAD_RUNS:]
    if not found:
        return None
    largest = max(_spread(one) for _, one in found)
    frame = Frame(0.0, 1.1 * largest or 0.01, SPREAD_TOP, SPREAD_HEIGHT - FOOT, len(found))
    bars = [_bar(frame, at, run, one, at == len(found) - 1) for at, (run, one) in enumerate(found)]
    bars[-1].set("tabindex", "0")
    label = f"Spread of the steps within {counted(len(found), 'run')}. The arrow keys go from run to run."
    return drawing(frame, PERCENT, SPREAD_HEIGHT, label, bars, dates([run for run, _ in found]))


def spreads_of(history: KeyHistory, metric: MetricHistory) -> list[float]:
    """The same distance over the median, of all runs that kept it."""
    return [_spread(run.metrics[metric.name]) for run in history.runs if _has_spread(run, metric)]


def sparkline(metric: MetricHistory) -> Element | None:
    """All values as a line, many as medians of several in a row, the last as a dot; None below two values."""
    known = [value for value in metric.values if value is not None]
    if len(known) < 2:
        return None
    each = math.ceil(len(known) / SPARK_POINTS)
    values = [statistics.median(known[at : at + each]) or 0.0 for at in range(0, len(known), each)]
    middle = statistics.median(known) or 0.0
    room = [middle * (1 - SPARK_LEAST), middle * (1 + SPARK_LEAST)]
    frame = Frame.around([*values, *room], 3, SPARK_HEIGHT - 3, len(values))
    width = SPARK_WIDTH - 8
    places = [(4 + width * at / (len(values) - 1), frame.y(value)) for at, value in enumerate(values)]
    line = element("polyline", points=" ".join(f"{x:.1f},{y:g}" for x, y in places))
    dot = element("circle", cx=round(places[-1][0], 1), cy=places[-1][1], r=3)
    title = f"history of {counted(len(known), 'run')}"
    return element(
        "svg", element("title", title), line, dot, class_="spark", width=SPARK_WIDTH, height=SPARK_HEIGHT, role="img",
        viewBox=f"0 0 {SPARK_WIDTH} {SPARK_HEIGHT}",
    )  # fmt: skip


def bar_width(frame: Frame) -> float:
    """Of a bar, in distances between runs."""
    return min(BAR_SHARE, WIDEST * frame.count)


def _bar(frame: Frame, at: int, run: RunRecord, one: Metric, newest: bool) -> Element:
    spread, width = _spread(one), bar_width(frame)
    said = f"half of {counted(one.n, 'step')} within ±{spread:.2%} of their median".replace("%", f"{SPACE}%")
    top = frame.y(spread)
    bar = element(
        "rect",
        x=frame.x(at - width / 2),
        width=f"{98 * width / frame.count:.2f}%",
        y=top,
        height=round(frame.bottom - top, 1),
    )
    return element(
        "g", element("title", describe(run, said)), bar, class_="mark bar newest" if newest else "mark bar",
        tabindex="-1", role="img",
    )  # fmt: skip


def _spread(one: Metric) -> float:
    return (one.mad or 0.0) / abs(one.median)


def _has_spread(run: RunRecord, metric: MetricHistory) -> bool:
    one = run.metrics.get(metric.name)
    if run.status != "finished" or one is None or one.unit != metric.unit or one.mad is None or one.median == 0:
        return False
    return abs(_spread(one)) < LARGEST
