"""``kpt regress check``, run as a build runs it: by its exit status and its files."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kpt_lightning.cli.main import app
from kpt_lightning.errors import ConfigError
from kpt_lightning.reports.markdown import MARKER
from kpt_lightning.tracking.baselines import new_baseline, pin
from kpt_lightning.tracking.record import Metric, RunRecord
from kpt_lightning.tracking.store import RunStore
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_store import KEY

FORMATS = ["table", "json", "junit", "markdown", "github"]


def kpt(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: for what ``main`` makes of an error."""
    environment = os.environ | {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}
    command = [sys.executable, "-m", "kpt_lightning.cli.main", "regress", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def check(history: str, *arguments: str) -> tuple[int, str]:
    """In this process: exit status and output."""
    done = CliRunner().invoke(
        app, ["regress", "check", "--store", history, *arguments], env={"COLUMNS": "200"}, catch_exceptions=False
    )
    return done.exit_code, done.stdout


@pytest.fixture
def history(tmp_path: Path) -> str:
    """Ten steady runs of one key."""
    place = str(tmp_path / "runs.sqlite")
    add(place, *STEADY)
    return place


def add(history: str, *values: float) -> list[RunRecord]:
    added = runs(list(values), start=len(RunStore(history).ids()))
    for record in added:
        RunStore(history).add(record)
    return added


def test_a_slower_run_fails_the_build_from_the_severity_on_that_is_asked_for(history: str) -> None:
    add(history, 0.1105)
    done = kpt("check", "--store", history)
    assert (done.returncode, done.stderr) == (1, "")
    assert "moderate regression" in done.stdout
    assert "+10." in done.stdout
    assert check(history, "--fail-on", "severe")[0] == 0
    status, text = check(history, "--json")
    assert status == 1
    assert [(each["outcome"], each["severity"], each["metric"]) for each in json.loads(text)] == [
        ("regression", "moderate", "step_time")
    ]


def test_a_run_as_before_and_a_faster_one_pass(history: str) -> None:
    add(history, 0.1)
    assert check(history)[0] == 0
    add(history, 0.05)
    status, text = check(history)
    assert status == 0
    assert "improvement" in text


def test_too_little_to_compare_with_is_a_status_of_its_own(tmp_path: Path) -> None:
    place = str(tmp_path / "runs.sqlite")
    assert check(place) == (3, "")
    assert not (tmp_path / "runs.sqlite").exists()
    RunStore(place).open()
    assert check(place) == (3, "No finished run in this history\n")
    add(place, 0.1, 0.1)
    status, text = check(place)
    assert status == 3
    assert "at least" in text


def test_a_history_that_cannot_be_read_and_wrong_usage_have_their_own(tmp_path: Path) -> None:
    (tmp_path / "runs.sqlite").write_bytes(b"no database, and long enough to be taken for one" * 100)
    done = kpt("check", "--store", str(tmp_path / "runs.sqlite"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    for wrong in (["--new", "0"], ["--fail-on", "tiny"], ["--format", "pdf"]):
        assert check(str(tmp_path / "x.sqlite"), *wrong)[0] == 2


@pytest.mark.parametrize(("last", "expected"), [(0.1105, 1), (0.1, 0)])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_the_same_exit_status_on_the_terminal_and_in_a_file(
    history: str, tmp_path: Path, form: str, last: float, expected: int
) -> None:
    add(history, last)
    status, printed = check(history, "--format", form)
    assert status == expected
    file = tmp_path / "new" / "folder" / "report"
    status, shown = check(history, "--format", form, "--output", str(file))
    assert status == expected
    assert "Newest runs against those before" in shown
    if form != "table":
        assert file.read_text(encoding="utf-8") == printed


def test_each_format_is_what_it_says(history: str) -> None:
    add(history, 0.1105)
    told = {form: check(history, "--format", form)[1] for form in FORMATS}
    headline = json.loads(told["json"])[0]["text"][0].partition(":")[0]
    assert headline.startswith("step time +10.")
    assert ET.fromstring(told["junit"].encode()).find("testsuite/testcase/failure").attrib["message"] == headline  # type: ignore[union-attr]
    assert told["markdown"].startswith(f"{MARKER}\n### Moderate regression: {headline} in m")
    assert told["github"].startswith("::error title=m%3A moderate regression::" + headline.replace("%", "%25"))
    assert headline in told["table"]


def test_json_for_short_contradicts_another_format(history: str) -> None:
    assert check(history, "--json", "--format", "json")[0] == 0
    with pytest.raises(ConfigError, match="contradicts --format junit"):
        check(history, "--json", "--format", "junit")


def test_a_file_that_cannot_be_written_is_wrong_usage(history: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = kpt("check", "--store", history, "--format", "junit", "--output", str(tmp_path / "file" / "report.xml"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--output" in done.stderr


def test_a_named_baseline_judges_and_a_missing_one_is_too_little(history: str) -> None:
    status, text = check(history, "--baseline", "main")
    assert status == 3
    assert "pinned as 'main'" in text
    pin(RunStore(history), [new_baseline("main", RunStore(history).all())])
    pin(RunStore(history), [new_baseline("slow", add(history, *[value * 1.1 for value in STEADY]))])
    # A slow level that was accepted under another name: only the older pin still tells.
    assert check(history)[0] == 0
    status, text = check(history, "--baseline", "main")
    assert status == 1
    assert "moderate regression" in text


def test_an_acknowledged_regression_is_shown_and_passes_until_it_gets_worse(history: str) -> None:
    add(history, 0.1105)
    acknowledged = ["regress", "ack", "step_time", "--store", history, "--name", "m", "--reason", "torch", "--expires"]
    assert CliRunner().invoke(app, [*acknowledged, "14d"], catch_exceptions=False).exit_code == 0
    status, text = check(history, "--format", "markdown")
    assert status == 0
    assert "**acknowledged moderate regression**" in text
    assert check(history, "--format", "github")[1].startswith("::notice ")
    skipped = ET.fromstring(check(history, "--format", "junit")[1].encode()).find("testsuite/testcase/skipped")
    assert skipped is not None
    add(history, 0.14)
    assert check(history)[0] == 1


def test_a_regression_stays_red_until_it_is_accepted(history: str) -> None:
    for _ in range(10):
        add(history, 0.1105)
        assert check(history)[0] == 1
    text = check(history, "--format", "markdown")[1]
    assert "since run 10" in text
    assert "judged by the runs before that one until it is fixed" in text
    accept = ["regress", "accept", "--store", history, "--last", "5"]
    assert CliRunner().invoke(app, accept, catch_exceptions=False).exit_code == 1
    assert CliRunner().invoke(app, [*accept, "--reason", "new loss"], catch_exceptions=False).exit_code == 0
    assert check(history)[0] == 0
    add(history, 0.1107)
    assert check(history)[0] == 0


def test_a_regression_stays_red_until_it_is_fixed(history: str) -> None:
    add(history, 0.1105, 0.111, 0.110)
    assert check(history)[0] == 1
    for _ in range(10):
        add(history, 0.1002)
        assert check(history)[0] == 0


def test_an_abandoned_key_is_left_out_by_name_or_key(history: str) -> None:
    old, new = KEY, replace(KEY, name="new")
    add(history, 0.1105)
    for number, value in enumerate([*STEADY, 0.1]):
        RunStore(history).add(replace(runs([value])[0], run_id=f"new-{number}", key=new))
    assert check(history)[0] == 1
    for chosen in (["--name", "new"], ["--key", new.digest[:10]], ["--key", new.digest, "--name", "new"]):
        status, text = check(history, "--json", *chosen)
        assert (status, {each["key"] for each in json.loads(text)}) == (0, {new.digest})
    assert check(history, "--name", old.name)[0] == 1
    for wrong in (["--name", "nobody"], ["--key", "zz"], ["--metric", "speed"]):
        with pytest.raises(ConfigError, match=r"Give one of these|List the keys"):
            check(history, *wrong)
    assert check(history, "--metric", "speed", "--metric", "step_time")[0] == 1


def test_a_metric_that_is_missing_is_told_and_fails_nothing(history: str) -> None:
    memory = Metric(median=2.0**30, unit="bytes", better="lower")
    for number, record in enumerate(runs(STEADY)):
        metrics = {**record.metrics, "peak_memory": memory}
        RunStore(history).add(replace(record, run_id=f"more-{number}", metrics=metrics))
    RunStore(history).add(replace(runs([0.1])[0], run_id="last"))
    assert "missing" not in check(history)[1]  # half of them are not most
    status, text = check(history, "--metric", "peak_memory")
    assert (status, "the newest run does not have it, 10 of 20 runs before do" in text) == (3, True)
    for form in FORMATS:
        assert "missing" in check(history, "--metric", "peak_memory", "--format", form)[1]


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_what_passed_shares_a_line_unless_all_is_asked_for(history: str, form: str) -> None:
    memory = Metric(median=2.0**30, unit="bytes", better="lower")
    for number, record in enumerate(runs([*STEADY, 0.1])):
        RunStore(history).add(replace(record, run_id=f"more-{number}", metrics={**record.metrics, "memory": memory}))
    folded, every = (check(history, "--format", form, *options)[1] for options in ([], ["--all"]))
    assert "100.000 ms" in every.partition("<details>")[0]
    assert "100.000 ms" not in folded.partition("<details>")[0]
    assert "step time, memory" in folded
    assert len(folded.partition("<details>")[0].splitlines()) < len(every.partition("<details>")[0].splitlines())


def test_a_log_is_wide_enough_for_the_table(history: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add(history, 0.1105)
    monkeypatch.delenv("COLUMNS", raising=False)
    done = subprocess.run(
        [sys.executable, "-m", "kpt_lightning.cli.main", "regress", "check", "--store", history],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert any("step time" in line and "moderate regression" in line for line in done.stdout.splitlines())
