"""The history of one metric as a chart: runs, levels with their interval, and what changed when."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from kpt_lightning.measure import statistics
from kpt_lightning.reports.elements import Element, element
from kpt_lightning.reports.histories import KeyHistory, MetricHistory
from kpt_lightning.reports.numbers import Scale, counted, moment
from kpt_lightning.reports.plot import SHAPES, Frame, dates, describe, drawing, mark

T = TypeVar("T")

TOP, HEIGHT, LANE, FOOT = 44, 208, 14, 20
"""Pixels: room for the flags, the whole plot, the lane below it for runs without a value, and the dates."""

MOST_FLAGS = 20
"""Changes, and moves of the environment, that one chart marks: the newest."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart, the shapes that it uses and how many runs one mark stands for at most."""

    drawing: Element
    used: Sequence[str]
    runs_a_mark: int


def history_chart(history: KeyHistory, metric: MetricHistory, scale: Scale, most_marks: int) -> Chart | None:
    """Every run, the levels with their interval, changes and moves of the environment; None without any value.

    Args:
        history: The runs.
        metric: One of its metrics.
        scale: For the texts.
        most_marks: From more runs on, a mark stands for several in a row.
    """
    known = [value for value in metric.values if value is not None]
    if not known:
        return None
    trusted = [
        v for v, run in zip(metric.values, history.runs, strict=True) if v is not None and run.status == "finished"
    ]
    frame = Frame.around(trusted or known, TOP, HEIGHT - FOOT - LANE, len(history.runs))
    each = math.ceil(len(history.runs) / most_marks)
    pairs = [_run(history, metric, frame, scale, at) for at in range(len(history.runs))] if each == 1 else [
        pair for start in range(0, len(history.runs), each)
        for pair in _several(history, metric, frame, scale, start, min(start + each, len(history.runs)))
    ]  # fmt: skip
    # One stop of the Tab key for the whole chart; the arrow keys go on from the newest run.
    pairs[-1][1].set("tabindex", "0")
    label = f"History of {counted(len(known), 'value')} of {metric.name}. The arrow keys go from run to run."
    drawn = drawing(
        frame, scale, HEIGHT, label, [*_levels(metric, frame), *_flags(history, metric, frame), *(m for _, m in pairs)],
        dates(history.runs),
    )  # fmt: skip
    return Chart(drawn, [name for name in SHAPES if any(name == used for used, _ in pairs)], each)


def _run(history: KeyHistory, metric: MetricHistory, frame: Frame, scale: Scale, at: int) -> tuple[str, Element]:
    run, value = history.runs[at], metric.values[at]
    shape = run.status if run.status != "finished" else "newest" if at == len(history.runs) - 1 else "finished"
    if value is None:
        title = describe(run, "no value")
        return shape, mark(shape, frame.x(at), HEIGHT - FOOT - 2, title, " absent")
    shape = frame.outside(value) or shape
    return shape, mark(shape, frame.x(at), frame.y(value), describe(run, scale.show(value)))


def _several(
    history: KeyHistory, metric: MetricHistory, frame: Frame, scale: Scale, start: int, stop: int
) -> list[tuple[str, Element]]:
    """Runs in a row as one mark: the median of those that finished over their range; one more if some did not."""
    runs, values = history.runs[start:stop], metric.values[start:stop]
    known = [v for v, run in zip(values, runs, strict=True) if v is not None and run.status == "finished"]
    ended = len(runs) - sum(run.status == "finished" for run in runs)
    x = frame.x((start + stop - 1) / 2)
    title = f"runs {start + 1:,} to {stop:,} · {moment(runs[0].created_at)} to {moment(runs[-1].created_at)}"
    found: list[tuple[str, Element]] = []
    middle = statistics.median(known)
    if middle is not None:
        said = f"median {scale.show(middle)}, {scale.number(min(known))} to {scale.show(max(known))} · {title}"
        reach = element("line", x1=x, x2=x, y1=frame.y(max(known)), y2=frame.y(min(known)), class_="range")
        found += [("several", reach), ("several", mark("several", x, frame.y(middle), said))]
    if ended or not found:
        said = f"{ended} of {len(runs)} did not finish" if ended else "no value"
        shape = "failed" if ended else "finished"
        found.append((shape, mark(shape, x, HEIGHT - FOOT - 2, f"{said} · {title}", " absent")))
    return found


def _levels(metric: MetricHistory, frame: Frame) -> list[Element]:
    drawn = []
    for level in metric.levels:
        left, right = frame.x(level.start - 0.5), frame.x(level.stop - 0.5)
        if level.interval.finite:
            top, bottom = frame.y(level.interval.high), frame.y(level.interval.low)
            width = f"{98 * (level.stop - level.start) / frame.count:.2f}%"
            height = round(max(bottom - top, 1.0), 1)
            drawn.append(element("rect", x=left, width=width, y=top, height=height, class_="band"))
        place = frame.y(level.value)
        drawn.append(element("line", x1=left, x2=right, y1=place, y2=place, class_="level"))
    return drawn


def _flags(history: KeyHistory, metric: MetricHistory, frame: Frame) -> list[Element]:
    """Numbers on changes, letters on moves of the environment, each in a row of its own."""
    drawn = []
    for name, step in flagged(metric.steps):
        drawn += _flag(frame, (step.before + step.after) / 2, 10, f"{name}", "change")
    for name, move in flagged(history.moves):
        drawn += _flag(frame, move.index - 0.5, 30, letter(name), "move")
    return drawn


def _flag(frame: Frame, place: float, y: int, text: str, kind: str) -> list[Element]:
    x = frame.x(place)
    return [
        element("line", x1=x, x2=x, y1=y, y2=frame.bottom, class_=f"{kind} pole"),
        element("circle", cx=x, cy=y, r=8.5, class_=f"{kind} flag"),
        element("text", text, x=x, y=y + 4, class_=f"{kind} sign", text_anchor="middle"),
    ]


def flagged(found: Sequence[T]) -> list[tuple[int, T]]:
    """The newest that a chart marks, numbered from 1 among all."""
    return list(enumerate(found, start=1))[-MOST_FLAGS:]


def letter(number: int) -> str:
    """1 is A, 26 is Z, 27 is AA."""
    text = ""
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(65 + rest) + text
    return text
