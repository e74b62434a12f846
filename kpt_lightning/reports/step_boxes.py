"""How the steps of each of the newest runs are distributed, as box bars: 5, 25, 50, 75 and 95 % of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from kpt_lightning.measure import statistics
from kpt_lightning.reports.elements import Child, Element, element
from kpt_lightning.reports.histories import KeyHistory, MetricHistory
from kpt_lightning.reports.numbers import SPACE, Scale, counted, percent_range
from kpt_lightning.reports.plot import LARGEST, Frame, dates, describe, drawing
from kpt_lightning.reports.small_charts import SPREAD_RUNS, bar_width
from kpt_lightning.tracking.record import RunRecord

TOP, HEIGHT, FOOT = 24, 200, 20
"""Pixels: room for the unit, the whole, and the dates."""

CAP_SHARE = 0.5
"""Width of a whisker's end over that of its box."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """The steps of one run.

    Attributes:
        run: Its record.
        steps: How many there are.
        half: Their 25, 50 and 75 % quantiles.
        reach: Their 5 and 95 % quantiles; None in a record from before these were kept.
    """

    run: RunRecord
    steps: int
    half: tuple[float, float, float]
    reach: tuple[float, float] | None

    @classmethod
    def of(cls, run: RunRecord, metric: MetricHistory) -> Self | None:
        """From what the run kept; None where that is not enough.

        An older record kept the median absolute deviation: half of the steps lie within it of the median.
        """
        one = run.metrics.get(metric.name)
        if run.status != "finished" or one is None or one.unit != metric.unit:
            return None
        if one.quantiles is not None and _drawable(one.quantiles):
            low, first, middle, third, high = one.quantiles
            return cls(run=run, steps=one.n, half=(first, middle, third), reach=(low, high))
        if one.mad is None or not _drawable((one.median, one.mad)):
            return None
        return cls(run=run, steps=one.n, half=(one.median - one.mad, one.median, one.median + one.mad), reach=None)

    @property
    def ends(self) -> tuple[float, float]:
        """What is drawn of it."""
        return self.reach or (self.half[0], self.half[2])

    def says(self, scale: Scale) -> str:
        """For the pointer and the keyboard."""
        first, middle, third = map(scale.number, self.half)
        unit = f"{SPACE}{scale.unit}" if scale.unit else ""
        parts = [f"median {middle}{unit}", f"half of {counted(self.steps, 'step')} {first} to {third}"]
        if self.reach is not None:
            low, high = map(scale.number, self.reach)
            parts.append(f"5 to 95{SPACE}% {low} to {high}")
        return describe(self.run, ", ".join(parts))


def boxes_of(history: KeyHistory, metric: MetricHistory) -> list[Box]:
    """Of the newest runs, oldest first; empty where none of these kept its quantiles."""
    found = [box for run in history.runs if (box := Box.of(run, metric)) is not None][-SPREAD_RUNS:]
    return found if any(box.reach for box in found) else []


def box_chart(boxes: Sequence[Box], scale: Scale) -> Element:
    """One bar a run with a line at the median, and whiskers to 5 and 95 % of its steps."""
    frame = Frame.around([end for box in boxes for end in box.ends], TOP, HEIGHT - FOOT, len(boxes))
    # One digit more than a level has: the ends of a box lie close together.
    fine = replace(scale, digits=scale.digits + 1)
    bars = [_bar(frame, fine, at, box, at == len(boxes) - 1) for at, box in enumerate(boxes)]
    bars[-1].set("tabindex", "0")
    label = f"Distribution of the steps within {counted(len(boxes), 'run')}. The arrow keys go from run to run."
    return drawing(frame, scale, HEIGHT, label, bars, dates([box.run for box in boxes]))


def box_legend(boxes: Sequence[Box]) -> Element:
    """What the parts of the bars mean, those that are there."""
    entries = [
        ("box", _half_sign(), "half of a run's steps, with their median"),
        ("box", _whisker_sign(), f"5 to 95{SPACE}% of its steps"),
        ("box newest", _half_sign(), "the newest run"),
    ]
    if not all(box.reach for box in boxes):
        entries.append(("box older", _half_sign(), "an older record, which kept no more than that half"))
    signs = [
        element("li", element("svg", *parts, class_=kind, width=16, height=16, aria_hidden="true"), text)
        for kind, parts, text in entries
    ]
    return element("ul", *signs, class_="legend")


def in_words(boxes: Sequence[Box]) -> str:
    """How far the steps of the newest run reach, beside those before; empty where its record does not tell."""
    reaches = [relative for box in boxes if (relative := _relative(box)) is not None]
    if _relative(boxes[-1]) is None:
        return ""
    said = f"Nine of ten steps of the newest run lie within {percent_range(*reaches[-1])} of their median"
    earlier = [statistics.median(ends) for ends in zip(*reaches[:-1], strict=True)]
    if earlier:
        low, high = (end or 0.0 for end in earlier)
        said += f"; in {counted(len(reaches) - 1, 'run')} before within {percent_range(low, high)}"
    return f"{said}."


def _bar(frame: Frame, scale: Scale, at: int, box: Box, newest: bool) -> Element:
    kind = "".join([" newest" * newest, " older" * (box.reach is None)])
    left, width = frame.x(at - 0.5), f"{98 / frame.count:.2f}%"
    # The whole column answers the pointer: a flat box is hard to hit.
    column = element("rect", x=left, width=width, y=TOP, height=HEIGHT - FOOT - TOP, class_="column")
    return element(
        "g", element("title", box.says(scale)), column, *_whiskers(frame, at, box), *_half(frame, at, box),
        class_=f"mark box{kind}", tabindex="-1", role="img",
    )  # fmt: skip


def _half(frame: Frame, at: int, box: Box) -> list[Element]:
    width = bar_width(frame)
    bottom, middle, top = map(frame.y, box.half)
    left, right = frame.x(at - width / 2), frame.x(at + width / 2)
    share = f"{98 * width / frame.count:.2f}%"
    return [
        element("rect", x=left, width=share, y=top, height=round(max(bottom - top, 1.0), 1), class_="half"),
        element("line", x1=left, x2=right, y1=middle, y2=middle, class_="middle"),
    ]


def _whiskers(frame: Frame, at: int, box: Box) -> list[Child]:
    """Lines from the box to both ends; an end beyond the scale has no cap."""
    if box.reach is None:
        return []
    x, width = frame.x(at), CAP_SHARE * bar_width(frame)
    left, right = frame.x(at - width / 2), frame.x(at + width / 2)
    drawn: list[Child] = []
    for start, end in ((box.half[0], box.reach[0]), (box.half[2], box.reach[1])):
        y = frame.y(end)
        drawn.append(element("line", x1=x, x2=x, y1=frame.y(start), y2=y, class_="whisker"))
        if frame.outside(end) is None:
            drawn.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="whisker"))
    return drawn


def _relative(box: Box) -> tuple[float, float] | None:
    middle = abs(box.half[1])
    if box.reach is None or not middle:
        return None
    return (box.reach[0] - box.half[1]) / middle, (box.reach[1] - box.half[1]) / middle


def _drawable(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) and abs(value) < LARGEST for value in values)


def _half_sign() -> list[Element]:
    box = element("rect", x=3, width=10, y=2, height=12, class_="half")
    return [box, element("line", x1=3, x2=13, y1=8, y2=8, class_="middle")]


def _whisker_sign() -> list[Element]:
    lines = [(8, 8, 2, 14), (4, 12, 2, 2), (4, 12, 14, 14)]
    return [element("line", x1=x1, x2=x2, y1=y1, y2=y2, class_="whisker") for x1, x2, y1, y2 in lines]
