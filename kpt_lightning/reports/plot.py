"""What all charts share: the way from values to the plot, shapes, marks and the axis.

Places along the runs are per cent and heights are pixels, so that a chart fits any width without a script while its
marks and texts keep their size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kpt_lightning.measure import statistics
from kpt_lightning.reports.elements import Child, Element, element, isolated
from kpt_lightning.reports.numbers import COMMIT, Scale, moment
from kpt_lightning.tracking.fingerprint import CODE_KEY
from kpt_lightning.tracking.record import RunRecord

OUTLYING = 4.0
"""Values further off than this many times the width of the middle 90 % are drawn at the edge, so that one spoiled run
does not flatten the rest."""

LARGEST = 1e300
"""Larger values are drawn here: the width of a range must itself be a number."""

SHAPES: Mapping[str, str] = {
    "finished": "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "newest": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "failed": "M0 -5.5L5.5 0L0 5.5L-5.5 0z",
    "interrupted": "M-4.5 -4.5h9v9h-9z",
    "above": "M-5 4.5L0 -4.5L5 4.5z",
    "below": "M-5 -4.5L0 4.5L5 -4.5z",
    "several": "M-2 0a2 2 0 1 0 4 0a2 2 0 1 0 -4 0z",
}
"""Outlines around the origin, in pixels. Failed and interrupted runs are drawn hollow."""

MEANINGS: Mapping[str, str] = {
    "finished": "a finished run",
    "newest": "the newest run",
    "failed": "failed",
    "interrupted": "interrupted",
    "above": "above the scale",
    "below": "below the scale",
    "several": "median of several runs, with their range",
}


def shapes() -> Element:
    """All outlines once; charts refer to them."""
    outlines = [element("path", id=f"shape-{name}", d=outline) for name, outline in SHAPES.items()]
    return element("svg", element("defs", *outlines), class_="definitions", aria_hidden="true")


@dataclass(frozen=True, slots=True)
class Frame:
    """From values and places to the plot: ``low`` to ``high`` over the pixels ``top`` to ``bottom``, ``count`` runs."""

    low: float
    high: float
    top: float
    bottom: float
    count: int

    @classmethod
    def around(cls, values: Sequence[float], top: float, bottom: float, count: int) -> "Frame":
        """All values with a margin, but for those that lie far off the others."""
        values = [min(max(value, -LARGEST), LARGEST) for value in values]
        ends = [statistics.quantile(values, q) or 0.0 for q in (0.0, 0.05, 0.95, 1.0)]
        reach = OUTLYING * max(ends[2] - ends[1], abs(ends[1]) * 0.005)
        low, high = max(ends[0], ends[1] - reach), min(ends[3], ends[2] + reach)
        # Where all values are equal, one per cent around them is shown.
        margin = max(0.08 * (high - low), 0.005 * max(abs(low), abs(high))) or 1.0
        return cls(low - margin, high + margin, top, bottom, count)

    def x(self, place: float) -> str:
        """Of a run's number; halves are between runs."""
        return f"{1 + 98 * (place + 0.5) / self.count:.2f}%"

    def y(self, value: float) -> float:
        """Of a value, kept inside the plot."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.bottom - share * (self.bottom - self.top), 1)

    def outside(self, value: float) -> str | None:
        """The shape for a value beyond the plot."""
        return "above" if value > self.high else "below" if value < self.low else None


def drawing(
    frame: Frame, scale: Scale, height: int, label: str, marks: Sequence[Child], ends: tuple[str, str]
) -> Element:
    """A plot with its axis.

    Args:
        frame: Of the marks.
        scale: Of the axis.
        height: Pixels.
        label: For a reader who does not see it.
        marks: In the order of drawing.
        ends: Texts below the first and the last run.
    """
    ticks, fine = scale.ticks(frame.low, frame.high)
    grid = [element("line", x1="0%", x2="100%", y1=frame.y(tick), y2=frame.y(tick), class_="grid") for tick in ticks]
    names = [element("text", fine.number(tick), x="100%", y=frame.y(tick) + 4, text_anchor="end") for tick in ticks]
    return element(
        "div",
        element("svg", *names, class_="axis", height=height, aria_hidden="true"),
        element(
            "svg", *grid, *marks,
            element("text", ends[0], x="1%", y=height - 4, class_="date"),
            element("text", ends[1], x="99%", y=height - 4, class_="date", text_anchor="end"),
            class_="plot", height=height, role="group", aria_label=label,
        ),
        element("span", scale.unit, class_="unit", aria_hidden="true") if scale.unit else None,
        class_="chart",
    )  # fmt: skip


def mark(shape: str, x: str, y: float, title: str, extra: str = "") -> Element:
    """A shape with a text that the pointer and the keyboard show."""
    return element(
        "use", element("title", title), href=f"#shape-{shape}", x=x, y=y, class_=f"mark {shape}{extra}", tabindex="-1",
        role="img",
    )  # fmt: skip


def describe(run: RunRecord, value: str) -> str:
    """What a mark says: value, run, time, commit and, where it did not finish, its status and last note."""
    commit = run.environment.get(CODE_KEY)
    parts = [
        value, f"run {isolated(run.run_id)}", moment(run.created_at),
        f"commit {isolated(commit[:COMMIT])}" if commit else "no commit",
    ]  # fmt: skip
    if run.status != "finished":
        parts.append(": ".join([run.status, *(isolated(note) for note in run.notes[-1:])]))
    return " · ".join(parts)


def dates(runs: Sequence[RunRecord]) -> tuple[str, str]:
    """The days of the first and the last run."""
    first, last = (moment(run.created_at)[:10] for run in (runs[0], runs[-1]))
    return ("" if first == last else first), last
