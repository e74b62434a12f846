"""Annotations as GitHub's runner reads them."""

import re
from dataclasses import replace

import pytest

from kpt_lightning.reports.annotations import MOST, to_annotations
from kpt_lightning.reports.findings import describe
from kpt_lightning.reports.words import visible
from kpt_lightning.tracking.review import Review
from tests.reports.test_findings import ODD, slower, told
from tests.tracking.test_alerts import SLOWER, STEADILY, histories
from tests.tracking.test_check import STEADY, runs


def read(text: str) -> list[tuple[str, str, str]]:
    """Level, title and message of each command, by the runner's rules: split first, then undo the escapes."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"::(error|warning|notice) title=([^:,]*)::(.*)", line)
        assert match is not None, line
        found.append((match[1], unescaped(match[2]), unescaped(match[3])))
    return found


def unescaped(text: str) -> str:
    for escape, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(escape, character)
    return text


@pytest.mark.parametrize(
    ("last", "fail_on", "level"),
    [(0.1105, "minor", "error"), (0.1105, "severe", "warning"), (0.05, "minor", "notice"), (0.1, "minor", None)],
)
def test_the_severity_decides_the_level(last: float, fail_on: str, level: str | None) -> None:
    found = told(runs([*STEADY, last]), fail_on)  # type: ignore[arg-type]
    assert [each for each, _, _ in read(to_annotations(found))] == ([level] if level else [])


def test_title_and_message_carry_the_whole_text() -> None:
    (found,) = told(slower())
    assert read(to_annotations([found])) == [("error", "m: moderate regression", "\n".join(found.lines))]


def test_metrics_that_fell_together_are_one_annotation() -> None:
    ((level, _, message),) = read(to_annotations(told(histories(*STEADILY, SLOWER))))
    assert level == "error"
    assert "together with tokens/s -" in message


@pytest.mark.parametrize("name", [*ODD, "50% of a, b: c"])
def test_odd_names_make_no_command_of_their_own(name: str) -> None:
    text = to_annotations(told(slower(name)))
    ((level, title, _),) = read(text)
    assert (level, title) == ("error", f"{visible(name)}: moderate regression")


def test_what_github_would_drop_is_counted() -> None:
    (checked,) = (each.checked for each in told(slower()))
    many = [replace(checked, key=replace(checked.key, name=f"n{number}")) for number in range(30)]
    found = read(to_annotations(describe(Review(records=(), found=tuple(many), alerts=()), "minor")))
    assert len(found) == MOST
    assert found[-1][2].startswith("21 more")
