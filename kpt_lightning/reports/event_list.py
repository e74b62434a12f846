"""What changed when, below a chart: its numbered changes of level and its lettered moves of the environment."""

from collections.abc import Collection

from kpt_lightning.reports.charts import flagged, letter
from kpt_lightning.reports.elements import Child, Element, by_user, element
from kpt_lightning.reports.histories import KeyHistory, MetricHistory, Move, Step
from kpt_lightning.reports.numbers import COMMIT, Scale, counted, moment, percent, percent_range
from kpt_lightning.reports.standing import name_of
from kpt_lightning.tracking.differences import differences
from kpt_lightning.tracking.fingerprint import CODE_KEY

MOST_DIFFERENCES = 6
"""Differences named at a change; the table of two runs has all."""

SHORT_VALUE = 60


def events(history: KeyHistory, metric: MetricHistory, scale: Scale, comparable: Collection[str]) -> Element | None:
    """The list, newest first; None where nothing changed.

    Args:
        history: Of the key.
        metric: Of the chart.
        scale: For its values.
        comparable: Ids of the runs that can be chosen in the table of two runs.
    """
    steps, moves = flagged(metric.steps), flagged(history.moves)
    found = [(step.after, _step(history, metric, scale, f"{name}", step, comparable)) for name, step in steps]
    found += [(move.index, _move(history, letter(name), move)) for name, move in moves]
    hidden = len(metric.steps) - len(steps) + len(history.moves) - len(moves)
    if not found:
        return None
    more = element("li", f"{counted(hidden, 'older one')} not shown.", class_="muted") if hidden else None
    ordered = [item for _, item in sorted(found, key=lambda event: -event[0])]
    return element("ul", *ordered, more, class_="events")


def _step(
    history: KeyHistory, metric: MetricHistory, scale: Scale, name: str, step: Step, comparable: Collection[str]
) -> Element:
    before, after = history.runs[step.before], history.runs[step.after]
    interval, words = step.change.interval, name_of(step.change.severity)
    unlike = differences(before, after)
    named = [
        element("li", by_user(what, SHORT_VALUE), ": ", by_user(_short(what, old)), " → ", by_user(_short(what, new)))
        for what, (old, new) in list(unlike.items())[:MOST_DIFFERENCES]
    ]
    if len(unlike) > MOST_DIFFERENCES:
        named.append(element("li", f"{len(unlike) - MOST_DIFFERENCES} more"))
    chosen = before.run_id in comparable and after.run_id in comparable
    button = element(
        "button", "Compare the runs on both sides", type="button", class_="choose scripted", data_before=before.run_id,
        data_after=after.run_id,
    )  # fmt: skip
    return element(
        "li",
        element("span", name, class_="flag-sign change", aria_hidden="true"),
        element(
            "div",
            element("strong", f"{percent(step.change.shift)} ({percent_range(interval.low, interval.high)}): {words}"),
            f", {scale.number(step.levels[0])} → {scale.show(step.levels[1])}. From run ",
            by_user(after.run_id, SHORT_VALUE),
            f" of {moment(after.created_at)} on (known to within two runs: {100 * step.change.confidence:.0f}\u00a0%).",
            element("span", "Different there:" if named else "Nothing else is different there.", class_="muted"),
            element("ul", *named) if named else None,
            button if chosen else None,
        ),
    )  # fmt: skip


def _move(history: KeyHistory, name: str, move: Move) -> Element:
    parts: list[Child] = []
    for what, (old, new) in list(move.changes.items())[:MOST_DIFFERENCES]:
        old_and_new = by_user(_short(what, old)), " → ", by_user(_short(what, new))
        parts += [" ", by_user(what, SHORT_VALUE), " ", *old_and_new, ";"]
    left = len(move.changes) - MOST_DIFFERENCES
    return element(
        "li",
        element("span", name, class_="flag-sign move", aria_hidden="true"),
        element(
            "div", element("strong", "Environment changed"), f" before {moment(history.runs[move.index].created_at)}:",
            *parts, f" {left} more;" if left > 0 else None, " a new base, with which older runs are not mixed.",
        ),
    )  # fmt: skip


def _short(name: str, value: object) -> str:
    text = "none" if value is None else f"{value}"
    return text[:COMMIT] if name.endswith(CODE_KEY) else text if len(text) <= SHORT_VALUE else f"{text[:SHORT_VALUE]}…"
