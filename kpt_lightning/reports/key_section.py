"""The section of one run key: each metric with its history, what changed, and the spread of its steps."""

from collections.abc import Collection, Sequence

from kpt_lightning.measure import statistics
from kpt_lightning.reports.charts import Chart, history_chart
from kpt_lightning.reports.elements import Child, Element, by_user, element
from kpt_lightning.reports.event_list import events
from kpt_lightning.reports.histories import KeyHistory, MetricHistory
from kpt_lightning.reports.numbers import COMMIT, Scale, counted, moment
from kpt_lightning.reports.overview import anchor, device, newest_level, scale_of, title
from kpt_lightning.reports.plot import MEANINGS
from kpt_lightning.reports.small_charts import spread_chart, spreads_of
from kpt_lightning.reports.standing import label, standing
from kpt_lightning.reports.step_boxes import box_chart, box_legend, boxes_of, in_words
from kpt_lightning.tracking.alerts import group_of
from kpt_lightning.tracking.fingerprint import CODE_KEY
from kpt_lightning.tracking.record import STATUSES, RunRecord

TABLE_RUNS, TABLE_METRICS = 30, 12
"""The newest runs, and the first metrics, that are listed with their values."""

SHORT_VALUE = 60


def key_section(history: KeyHistory, most_marks: int, most_charts: int, comparable: Collection[str]) -> Element:
    """All about one key.

    Args:
        history: Of the key.
        most_marks: In one chart.
        most_charts: Metrics that are drawn.
        comparable: Ids of the runs that can be chosen below.
    """
    key = history.key
    facts: list[tuple[str, list[Child]]] = [
        ("Device", device(history)), ("Precision", [by_user(key.precision)]), ("Strategy", [by_user(key.strategy)]),
        ("Runs", [_counts(history.runs)]), ("Key", [element("code", key.digest)]),
    ]  # fmt: skip
    opened = _opened(history.metrics)
    metrics = [
        _metric(history, each, each.name in opened, most_marks, comparable) for each in history.metrics[:most_charts]
    ]
    left = len(history.metrics) - len(metrics)
    return element(
        "section",
        element("h2", title(history), id=anchor(history), tabindex="-1"),
        element("dl", *(element("div", element("dt", name), element("dd", *said)) for name, said in facts)),
        *(metrics or [element("p", "No run of this key has a metric.")]),
        element("p", f"{counted(left, 'more metric')} not drawn; what got worse comes first.") if left > 0 else None,
        _runs(history) if history.metrics else None,
        class_="key",
    )


def _counts(runs: Sequence[RunRecord]) -> str:
    by_status = {status: sum(run.status == status for run in runs) for status in STATUSES}
    return ", ".join(f"{count:,} {status}" for status, count in by_status.items() if count)


def _opened(metrics: Sequence[MetricHistory]) -> set[str]:
    """The main metric, and of each group of correlated ones the first that got worse: the others tell the same."""
    worse = {group_of(metric.name, metric.unit): metric.name for metric in reversed(metrics) if metric.rank[0] > 0}
    return {*worse.values(), *(metric.name for metric in metrics[:1])}


def _metric(
    history: KeyHistory, metric: MetricHistory, opened: bool, most_marks: int, comparable: Collection[str]
) -> Element:
    scale, level, said = scale_of(metric), newest_level(metric), standing(history, metric)
    chart = history_chart(history, metric, scale, most_marks)
    summary = element(
        "summary",
        element("h3", by_user(label(metric.name), SHORT_VALUE)),
        element("span", scale.show(level), class_="figure") if level is not None else None,
        element("span", said.change, class_="figure") if said.change else None,
        said.badge(),
    )
    notes = [f"{said.change} ({said.interval}): {said.against}."] if said.change else []
    if metric.checked is not None and metric.checked.note:
        notes.append(f"{metric.checked.note[0].upper()}{metric.checked.note[1:]}.".replace(" -> ", " → "))
    if metric.acknowledged is not None:
        ack = metric.acknowledged
        notes.append(f"Acknowledged by {ack.author} until {moment(ack.expires_at)}: {ack.reason}")
    if metric.other_units:
        notes.append(f"{counted(metric.other_units, 'run')} with another unit than {metric.unit} left out.")
    body: list[Child] = [element("p", *(element("span", by_user(note)) for note in notes), class_="notes")]
    body += [element("p", "No run has a finite value.")] if chart is None else _chart(history, chart)
    body += [events(history, metric, scale, comparable), *_steps(history, metric, scale)]
    return element("details", summary, *body, class_="metric", open=opened)


def _chart(history: KeyHistory, chart: Chart) -> list[Child]:
    signs = [element("li", _sign(name), MEANINGS[name]) for name in chart.used]
    level = element("span", class_="sign-level", aria_hidden="true")
    signs.append(element("li", level, "level with its 95\u00a0% interval"))
    thinned = None
    if chart.runs_a_mark > 1:
        thinned = element(
            "p", f"{len(history.runs):,} runs: each mark stands for up to {chart.runs_a_mark} in a row. "
            "Fewer runs, as by --last 300, are drawn one by one.", class_="muted",
        )  # fmt: skip
    return [chart.drawing, element("ul", *signs, class_="legend"), thinned]


def _sign(name: str) -> Element:
    shape = element("use", href=f"#shape-{name}", x=8, y=8, class_=name)
    return element("svg", shape, width=16, height=16, aria_hidden="true")


def _steps(history: KeyHistory, metric: MetricHistory, scale: Scale) -> list[Child]:
    """The distribution of the steps within each run, as far as its record tells it."""
    boxes = boxes_of(history, metric)
    if not boxes:
        return _spread(history, metric)
    said = in_words(boxes)
    return [
        element("h4", "Spread of the steps within each run"),
        box_chart(boxes, scale),
        box_legend(boxes),
        element("p", said, class_="muted") if said else None,
    ]


def _spread(history: KeyHistory, metric: MetricHistory) -> list[Child]:
    """Where no record holds more than the deviation of its steps."""
    drawing = spread_chart(history, metric)
    if drawing is None:
        return []
    spreads = spreads_of(history, metric)
    said = "Half of the steps of a run lie within this of their median."
    earlier = statistics.median(spreads[:-1])
    said += f" Newest run: ±{spreads[-1]:.2%}"
    said += f"; {counted(len(spreads) - 1, 'run')} before: ±{earlier:.2%}." if earlier is not None else "."
    return [
        element("h4", "Spread of the steps within each run"),
        drawing,
        element("p", said.replace("%", "\u00a0%"), class_="muted"),
    ]


def _runs(history: KeyHistory) -> Element:
    """The newest runs as a table: what the charts show, for those who read numbers."""
    metrics = history.metrics[:TABLE_METRICS]
    scales = [scale_of(metric) for metric in metrics]
    head = ["Run", "Time", "Commit", "Status"]
    rows = []
    for at in range(len(history.runs) - 1, max(len(history.runs) - 1 - TABLE_RUNS, -1), -1):
        run = history.runs[at]
        values = [metric.values[at] for metric in metrics]
        shown = ["" if value is None else scale.show(value) for scale, value in zip(scales, values, strict=True)]
        rows.append(
            element(
                "tr", element("th", by_user(run.run_id, SHORT_VALUE), scope="row"),
                element("td", moment(run.created_at)),
                element("td", by_user(run.environment.get(CODE_KEY, "")[:COMMIT])), element("td", run.status),
                *(element("td", text, class_="number") for text in shown),
            )
        )  # fmt: skip
    names: list[Element | str] = [*head, *(by_user(label(metric.name), SHORT_VALUE) for metric in metrics)]
    count = counted(len(rows), "newest run") if len(rows) < len(history.runs) else counted(len(rows), "run")
    table = element(
        "table", element("thead", element("tr", *(element("th", name, scope="col") for name in names))),
        element("tbody", *rows),
    )  # fmt: skip
    return element(
        "details", element("summary", element("h3", f"Values of the {count}")),
        element("div", table, class_="scroll", tabindex="0", role="region", aria_label="Values of the newest runs"),
        class_="metric",
    )  # fmt: skip
