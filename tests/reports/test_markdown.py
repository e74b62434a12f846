"""Markdown that shows what was found and nothing else, read by a parser of its own."""

import html
import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from kpt_lightning.reports.findings import describe
from kpt_lightning.reports.markdown import MARKER, MOST_CHARACTERS, prose, to_markdown
from kpt_lightning.reports.words import visible
from kpt_lightning.tracking.review import Review
from tests.reports.test_findings import ODD, slower, told
from tests.tracking.test_alerts import SLOWER, STEADILY, histories
from tests.tracking.test_store import KEY

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def cells(text: str) -> list[list[str]]:
    """Text of each cell of the rendered table, head row first."""
    rows = re.findall(r"<tr>(.*?)</tr>", PARSER.render(text), re.DOTALL)
    return [[plain(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def plain(text: str) -> str:
    return html.unescape(re.sub(r"</?(?:strong|p|h3)>", "", text)).replace("\u200b", "")


def test_the_headline_says_what_got_worse_by_how_much_and_since_when() -> None:
    first, headline, *_ = to_markdown(told(slower())).splitlines()
    assert first == MARKER
    assert headline.startswith("### Moderate regression: step time +10.4% (95% interval +")
    assert headline.endswith("in m, since run 10 of commit cccccccccc")


@pytest.mark.parametrize(
    ("fold", "last"), [(True, ["2 metrics: peak memory, final loss"]), (False, ["peak memory", "final loss"])]
)
def test_the_table_folds_what_passed_and_the_details_hold_every_metric(fold: bool, last: list[str]) -> None:
    found = told(histories(*STEADILY, SLOWER))
    text = to_markdown(found, fold=fold)
    head, *rows = cells(text)
    assert head == ["run", "metric", "before", "now", "change", "95% interval", "verdict"]
    assert {len(row) for row in rows} == {len(head)}
    assert [row[1] for row in rows] == ["step time", "tokens/s", "MFU", *last]
    assert [row[6] for row in rows] == ["severe regression"] * 3 + ["pass"] * len(last)
    details = text.partition("<details>")[2]
    assert details.rstrip().endswith("</details>")
    for each in found:
        assert all(prose(line) in details for line in each.lines)


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_shown_as_they_are(name: str) -> None:
    records = [replace(run, metrics={name: run.metrics["step_time"]}) for run in slower(name)]
    text = to_markdown(told(records))
    (_, row) = cells(text)
    assert row[:2] == [visible(name).strip()] * 2
    assert row[6] == "moderate regression"
    rendered = PARSER.render(text)
    assert not re.search(r"<(?:a|em|code|del|b|img|ol)\b", rendered)
    assert not re.search(r"@\w", text)


@pytest.mark.parametrize(
    "start", ["- list", "+ list", "10. list", "1) list", "= line", "# head", "> quote", "* star", "---", "==="]
)
def test_prose_begins_no_block(start: str) -> None:
    assert PARSER.render(f"- {prose(start)}\n") == f"<ul>\n<li>{html.escape(start)}</li>\n</ul>\n"


def test_numbers_are_not_cluttered() -> None:
    assert prose("-65.2% (95% interval -67.7% to -62.7%)") == "-65.2% (95% interval -67.7% to -62.7%)"
    assert prose("13.000 ms") == "13.000 ms"


@pytest.mark.parametrize("name", ["n", "|" * 300])
def test_it_fits_a_comment_however_many_runs_there_are(name: str) -> None:
    (checked,) = (each.checked for each in told(slower()))
    many = [replace(checked, key=replace(KEY, name=f"{name}{number}")) for number in range(3000)]
    text = to_markdown(describe(Review(records=(), found=tuple(many), alerts=()), "minor"))
    assert 0.8 * MOST_CHARACTERS < len(text) <= MOST_CHARACTERS
    rows = len(cells(text)) - 1
    assert f"\n{3000 - rows} more rows in the output of" in text
    assert text.rstrip().endswith("</details>")


def test_nothing_to_tell_is_told() -> None:
    assert to_markdown([]) == f"{MARKER}\n### No finished run in this history\n"
