"""What a check found, in words: what matters first, and nothing in a name can do harm."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from kpt_lightning.reports.findings import Finding, describe, summary, to_data
from kpt_lightning.reports.words import LONGEST, level, percent, visible
from kpt_lightning.tracking.acks import new_ack
from kpt_lightning.tracking.alerts import group_alerts
from kpt_lightning.tracking.baselines import new_baseline
from kpt_lightning.tracking.check import check_runs
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.review import Review
from kpt_lightning.tracking.severity import Severity
from tests.tracking.test_alerts import SLOWER, STEADILY, histories
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_store import KEY

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
ODD = [
    "plain", "quotes \" and ' & <b>tags</b> ]]>", "tab\tline\nreturn\rnull\x00escape\x1b[31m", "日本語 ü 🙂 \u202eback",
    "lone \ud800 surrogate \ufffe", "a|b `code` *x* _y_ [l](u) @team #12 ~~s~~ $m$ <!-- --> \\", "- list", "1. list",
    "::error title=x::y%0A", "  padded  ",
]  # fmt: skip


def told(records: Sequence[RunRecord], fail_on: Severity = "minor", **options: object) -> list[Finding]:
    """A history judged and put into words, as ``kpt regress check`` does."""
    found = check_runs(records, **options)  # type: ignore[arg-type]
    alerts = group_alerts(found, records)
    return describe(Review(records=tuple(records), found=tuple(found), alerts=tuple(alerts)), fail_on)


def slower(name: str = "m", factor: float = 1.105) -> list[RunRecord]:
    """A history of one metric whose newest run is worse."""
    return runs(
        [*STEADY, 0.1 * factor], key=replace(KEY, name=name), environment={"torch": "2", "git_commit": "c" * 40}
    )


@pytest.mark.parametrize(
    ("last", "fail_on", "state", "verdict"),
    [
        (0.1105, "minor", "failing", "moderate regression"),
        (0.1105, "moderate", "failing", "moderate regression"),
        (0.1105, "severe", "tolerated", "moderate regression"),
        (0.1012, "minor", "passed", "pass"),
        (0.0500, "minor", "improved", "improvement"),
    ],
)
def test_severity_and_what_fails_a_build_decide_the_state(
    last: float, fail_on: Severity, state: str, verdict: str
) -> None:
    (found,) = told(runs([*STEADY, last]), fail_on)
    assert (found.state, found.verdict) == (state, verdict)


def test_the_words_say_what_by_how_much_with_interval_and_since_when() -> None:
    (found,) = told(slower())
    assert found.headline.startswith("step time +10.4% (95% interval +")
    assert (found.before, found.now) == ("100.000 ms", "110.500 ms")
    assert found.since == "since run 10 of commit cccccccccc"
    assert found.compared == "compared with 10 runs up to run 9 of commit cccccccccc"
    assert found.lines[0] == f"{found.headline}: moderate regression"
    assert found.lines[-1].startswith("key ")
    assert summary([found]) == f"Moderate regression: {found.headline} in m, {found.since}"


def test_since_is_the_run_at_which_the_history_changed() -> None:
    found = told(histories(*STEADILY, {}, SLOWER, SLOWER, SLOWER, SLOWER), new=5)
    assert {each.since for each in found if each.state == "failing"} == {"since run 21"}


def test_metrics_that_fell_together_are_told_together_the_cause_first() -> None:
    found = told(histories(*STEADILY, SLOWER | {"peak_memory": 1.1}))
    assert [(each.metric, each.leading, each.state) for each in found] == [
        ("step time", "", "failing"), ("tokens/s", "step time", "failing"), ("MFU", "step time", "failing"),
        ("peak memory", "", "failing"), ("final loss", "", "passed"),
    ]  # fmt: skip
    assert [each.split()[0] for each in found[0].consequences] == ["tokens/s", "MFU"]
    assert summary(found).endswith(", and 1 more regression")


def test_an_acknowledged_regression_is_shown_with_its_reason_and_fails_nothing() -> None:
    ack = new_ack(
        key_digest=KEY.digest, run_name="m", metric="step_time", severity="moderate", shift=0.1,
        base_runs=[str(number) for number in range(10)], reason="wait\nfor torch", expires=NOW + timedelta(days=3),
    )  # fmt: skip
    (found,) = told(runs([*STEADY, 0.1105]), acks=[ack], now=NOW)
    assert (found.state, found.verdict) == ("acknowledged", "acknowledged moderate regression")
    assert f"by {ack.author} until 2026-06-04T12:00 UTC: wait\\nfor torch" in found.reasons[1]
    assert summary([found]) == "No regression that fails the build: 1 metric, 1 known to be worse"
    (found,) = told(runs([*STEADY, 0.1]), acks=[ack], now=NOW)
    assert found.reasons[1] == "the acknowledgement (wait\\nfor torch) ended: recovered"


def test_a_named_baseline_is_named_and_a_missing_one_is_told() -> None:
    records = runs([*STEADY, 0.12, 0.12])
    (found,) = told(records, baseline="main", pins={KEY.digest: new_baseline("main", records[:10])})
    assert found.state == "failing"
    assert found.compared == "compared with 10 runs up to run 9, pinned as 'main'"
    (found,) = told(records, baseline="main", pins={})
    assert (found.state, found.verdict, found.compared, found.since) == ("unsettled", "no baseline", "", "")
    assert summary([found]).startswith("Nothing could be judged: no run to compare with; no run of this key is pinned")


def test_a_history_without_runs_is_told() -> None:
    assert summary(told([])) == "No finished run in this history"


def test_data_keep_names_and_numbers_as_they_are_stored() -> None:
    data = to_data(told(slower("odd \x1b name"))[0])
    assert data["name"] == "odd \x1b name"
    assert (data["outcome"], data["severity"], data["state"]) == ("regression", "moderate", "failing")
    assert data["new_runs"] == ["10"]
    assert (data["baseline_runs"], data["acknowledged"]) == (10, None)
    low, high = data["interval"]
    assert low < data["shift"] < high


@pytest.mark.parametrize("name", ODD)
def test_no_name_can_end_a_line_or_command_a_terminal(name: str) -> None:
    shown = visible(name)
    assert shown.splitlines() == [shown]
    assert not any(ord(each) < 32 or 0xD800 <= ord(each) < 0xE000 for each in shown)
    assert "\u202e" not in shown
    shown.encode()
    assert all(part in shown for part in name.split() if part.isascii() and part.isprintable())


def test_a_long_name_is_cut_and_an_ordinary_one_is_not() -> None:
    assert visible("日本語 ü 🙂") == "日本語 ü 🙂"
    assert len(visible("x" * 5000)) == LONGEST


@pytest.mark.parametrize(
    ("value", "unit", "text"), [(0.25, "s", "250.000 ms"), (5e3, "tokens/s", "5,000/s"), (1.5, "ops\n", "1.5 ops\\n")]
)
def test_a_level_has_its_unit(value: float, unit: str, text: str) -> None:
    assert level(value, unit) == text


def test_a_huge_shift_is_a_factor() -> None:
    assert (percent(0.105), percent(-0.2), percent(11.0)) == ("+10.5%", "-20.0%", "x12")
