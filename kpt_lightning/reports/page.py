"""The history of runs as one HTML file that needs nothing else: no network, no server, and a script only to choose."""

import base64
import hashlib
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from importlib import resources

from kpt_lightning.optional import installed_version
from kpt_lightning.reports.elements import Element, by_user, element, to_html
from kpt_lightning.reports.histories import KeyHistory, histories
from kpt_lightning.reports.key_section import key_section
from kpt_lightning.reports.numbers import counted, moment
from kpt_lightning.reports.overview import anchor, overview, title
from kpt_lightning.reports.plot import shapes
from kpt_lightning.reports.two_runs import as_json, choices, two_runs
from kpt_lightning.tracking.acks import Ack
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.severity import DEFAULT_LIMITS

MOST_MARKS, CHART_MARKS = 7_000, 300
MOST_CHARTS, MOST_SECTIONS = 120, 60
"""Marks of all charts together and of one, charts, and keys with charts. They make the file, which is to stay below
5 MB: that is what a mail or a build's page still takes.
"""

HOW_TO_READ = (
    ("Level", "the median of the runs since the last change; its band is the 95 % interval of that median, drawn from "
     "six runs on."),
    ("Change", "a lasting change of level inside one environment, found as kpt regress check finds it. A changed "
     "environment begins a new base: nothing is compared across it."),
    ("Verdict", "of the newest run against those before it, or of the last change where that still stands. "
     f"Severity counts the loss that is certain: minor from {100 * DEFAULT_LIMITS.minor:g} %, moderate from "
     f"{100 * DEFAULT_LIMITS.moderate:g} %, severe from {100 * DEFAULT_LIMITS.severe:g} %."),
    ("Order", "of the runs is that in which they were stored; the distance between two marks is no time."),
    ("Keys", "in a chart: Tab enters it at the newest run, the arrow keys, Home and End move, Escape hides the text."),
)  # fmt: skip


def render_report(
    records: Sequence[RunRecord], *, source: str = "", acks: Sequence[Ack] = (), accepted: Collection[str] = (),
    made: datetime | None = None,
) -> str:  # fmt: skip
    """The page.

    Args:
        records: A history, oldest first.
        source: Where it is kept, for the reader.
        acks: Acknowledgements of regressions.
        accepted: Ids of runs that somebody accepted as a base, see :func:`kpt_lightning.tracking.reference.reference`.
        made: Time that the page names; now if not given.

    Raises:
        ValueError: ``records`` is empty.
    """
    if not records:
        raise ValueError("records=[]: must hold at least one run.")
    found = histories(records, acks, accepted)
    shown = _shown(found)
    charts = sum(min(len(history.metrics), MOST_CHARTS) for history in shown)
    marks = min(MOST_MARKS // max(charts, 1), CHART_MARKS)
    offered = choices(found)
    comparable = {choice.run.run_id for group in offered.values() for choice in group}
    sections = [key_section(each, marks, MOST_CHARTS, comparable) for each in shown]
    pair = two_runs(found, offered)
    body = element(
        "body",
        element("a", "Skip to the overview", href="#overview", class_="skip"),
        shapes(),
        _header(records, found, source, made or datetime.now(UTC)),
        _contents(shown, pair is not None),
        element("main", overview(found, {each.key.digest for each in shown}), _how_to_read(), *sections, pair),
        element("div", id="tip", hidden=True, aria_hidden="true"),
        element("noscript", element("p", "Without scripts two other runs cannot be chosen; all else is here.")),
    )
    data = element("script", type="application/json", id="data")
    # Not through element(): scripts are written as they are, and this text escapes what could end one.
    data.text = as_json(offered) if pair is not None else "{}"
    body.append(data)
    return "<!DOCTYPE html>\n" + to_html(element("html", _head(), body, lang="en")) + "\n"


def _shown(found: Sequence[KeyHistory]) -> list[KeyHistory]:
    """The keys that get charts: the worst, as many as the file can hold."""
    shown: list[KeyHistory] = []
    charts = 0
    for history in found:
        charts += len(history.metrics)
        if shown and (charts > MOST_CHARTS or len(shown) == MOST_SECTIONS):
            break
        shown.append(history)
    return shown


def _head() -> Element:
    style, script = _asset("page.css"), _asset("page.js")
    # The browser itself refuses whatever is not in this file.
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    made = [element("style"), element("script")]
    made[0].text, made[1].text = style, script
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", "Training runs: kpt regress report"),
        element("link", rel="icon", href="data:,"),
        *made,
    )


def _header(records: Sequence[RunRecord], found: Sequence[KeyHistory], source: str, made: datetime) -> Element:
    span = f"{moment(records[0].created_at)} to {moment(records[-1].created_at)}"
    version = installed_version("kpt-lightning") or ""
    about = f"{counted(len(records), 'run')} of {counted(len(found), 'key')}, {span}. "
    return element(
        "header",
        element(
            "div", element("h1", "Training runs"),
            element("button", "Dark colours", type="button", id="theme", class_="scripted"), class_="bar",
        ),
        element(
            "p", about, "From " if source else None, by_user(source) if source else None, ". " if source else None,
            f"Made {moment(made.isoformat())} by kpt-lightning {version}.", class_="muted",
        ),
    )  # fmt: skip


def _contents(shown: Sequence[KeyHistory], pair: bool) -> Element:
    links = [element("a", "Overview", href="#overview")]
    links += [element("a", title(history), href=f"#{anchor(history)}") for history in shown]
    if pair:
        links.append(element("a", "Two runs side by side", href="#two-runs"))
    return element("nav", element("ul", *(element("li", link) for link in links)), aria_label="Contents")


def _how_to_read() -> Element:
    parts = [element("div", element("dt", name), element("dd", text)) for name, text in HOW_TO_READ]
    return element("details", element("summary", "How to read this page"), element("dl", *parts), class_="how")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
