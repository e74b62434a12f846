"""The overview: one row for each run key, what is worst first."""

from collections.abc import Collection, Sequence

from kpt_lightning.reports.elements import Child, Element, by_user, element
from kpt_lightning.reports.histories import RANKS, KeyHistory, MetricHistory
from kpt_lightning.reports.numbers import TIMES, Scale, counted
from kpt_lightning.reports.small_charts import sparkline
from kpt_lightning.reports.standing import label, standing

MOST_ROWS = 500
"""Keys in the table; a longer one is of no use to a reader."""

SHORT_NAME = 60
MOST_OTHERS = 3
SHORT_DIGEST = 8
COLUMNS = ("Run", "Device", "Precision", "Newest level", "Change", "Verdict", "History")


def overview(found: Sequence[KeyHistory], shown: Collection[str]) -> Element:
    """The section.

    Args:
        found: Worst first.
        shown: Digests of the keys that have a section to link to.
    """
    head = element("tr", *(element("th", name, scope="col", role="columnheader") for name in COLUMNS), role="row")
    rows = [_row(history, history.key.digest in shown) for history in found[:MOST_ROWS]]
    undrawn = len(found) - len(shown)
    more = (
        f"Without charts: {counted(undrawn, 'key')} with less to tell; --name or --key chooses some." if undrawn else ""
    )
    if len(rows) < len(found):
        more += f" Only {len(rows):,} of {len(found):,} keys are listed."
    return element(
        "section",
        element("h2", "Overview", id="overview", tabindex="-1"),
        element("p", headline(found), class_="headline"),
        element(
            "table",
            element("thead", head, role="rowgroup"),
            element("tbody", *rows, role="rowgroup"),
            class_="overview", role="table", aria_labelledby="overview",
        ),
        element("p", more, class_="muted") if more else None,
    )  # fmt: skip


def headline(found: Sequence[KeyHistory]) -> str:
    """The page in one sentence."""
    worse = [history for history in found if history.rank[0] >= RANKS["minor"]]
    total = counted(len(found), "run key")
    if not worse:
        return f"Nothing certain is worse: {total}."
    severe = sum(history.rank[0] >= RANKS["severe"] for history in worse)
    return f"{len(worse):,} of {total} {'need' if len(worse) > 1 else 'needs'} a look" + (
        f", {severe:,} of them severe." if severe else "."
    )


def title(history: KeyHistory) -> Element:
    """The name of the key, cut where it is very long."""
    return by_user(history.key.name or "(no name)", SHORT_NAME)


def device(history: KeyHistory) -> list[Child]:
    """How many of which."""
    return [f"{history.key.device_count} {TIMES} ", by_user(history.key.device, SHORT_NAME)]


def anchor(history: KeyHistory) -> str:
    """The place of its section in the page."""
    return f"key-{history.key.digest}"


def newest_level(metric: MetricHistory) -> float | None:
    """Where it stands now; the newest value where no finished run gave a level."""
    if metric.levels:
        return metric.levels[-1].value
    return next((value for value in reversed(metric.values) if value is not None), None)


def scale_of(metric: MetricHistory) -> Scale:
    """By its level, so that one spoiled run does not choose the unit."""
    level = newest_level(metric)
    return Scale.of([] if level is None else [level], metric.unit, metric.name)


def _row(history: KeyHistory, linked: bool) -> Element:
    name = element("a", title(history), href=f"#{anchor(history)}") if linked else title(history)
    short = history.key.digest[:SHORT_DIGEST]
    about = element("span", f"key {short}, {counted(len(history.runs), 'run')}", class_="muted")
    cells: list[list[Child]] = [
        [element("strong", name), about, *_problems(history)], [element("span", *device(history))],
        [element("span", by_user(history.key.precision, SHORT_NAME))],
        *_cells_of_metric(history),
    ]  # fmt: skip
    made = [
        element("th" if at == 0 else "td", *parts, role="rowheader" if at == 0 else "cell", data_label=COLUMNS[at],
                scope="row" if at == 0 else None)
        for at, parts in enumerate(cells)
    ]  # fmt: skip
    return element("tr", *made, role="row")


def _cells_of_metric(history: KeyHistory) -> list[list[Child]]:
    if not history.metrics:
        return [["no metric"], [], [], []]
    main = history.metrics[0]
    level, said = newest_level(main), standing(history, main)
    value = "no value" if level is None else scale_of(main).show(level)
    line = sparkline(main)
    return [
        [
            element("span", value, class_="figure"),
            element("span", by_user(label(main.name), SHORT_NAME), class_="muted"),
        ],
        [*said.figures()],
        [said.badge(), *_others(history)],
        [line] if line is not None else [element("span", "one value", class_="muted")],
    ]


def _others(history: KeyHistory) -> list[Child]:
    """The metrics beside the main one that got worse."""
    worse = sorted(history.metrics[1:], key=lambda each: -each.rank[0])
    return [
        element("span", by_user(label(each.name), SHORT_NAME), f": {standing(history, each).verdict}", class_="muted")
        for each in worse[:MOST_OTHERS] if each.rank[0] > 0
    ]  # fmt: skip


def _problems(history: KeyHistory) -> list[Child]:
    return [
        element("span", element("span", "✖ ", aria_hidden="true"), text, class_="badge severe")
        for text in history.problems
    ]
