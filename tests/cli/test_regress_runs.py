"""``kpt regress record``, ``history`` and ``compare``."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kpt_lightning.tracking.store import RunStore
from tests.cli.kpt_command import regress
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_store import KEY, make


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "runs.sqlite"


def add(place: Path, *records: object) -> Path:
    for record in records:
        RunStore(place).add(record)  # type: ignore[arg-type]
    return place


def test_recorded_runs_are_judged_like_those_of_the_callback(place: Path) -> None:
    for value in (10.0, 10.1, 9.9, 10.0, 10.05, 9.95):
        assert regress(place, "record", "--name", "bench", f"step_time={value}ms").status == 0
    done = regress(place, "record", "--name", "bench", "step_time=13ms", "images=80images/s", "--higher", "images")
    assert done.status == 0
    assert "step_time 0.013 s, images 80 images/s" in done.out
    assert regress(place, "check", "--metric", "step_time").status == 1
    newest = RunStore(place).all()[-1]
    assert (newest.metrics["images"].better, newest.key.name) == ("higher", "bench")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["step_time=nan", "--name", "b"], "finite"),
        (["step_time=inf", "--name", "b"], "finite"),
        (["step_time=-1", "--name", "b"], "negative"),
        (["step_time=1"], "--name"),
        (["step_time=1", "--name", "b", "--id", "x" * 65], "64"),
        (["step_time=1", "--name", "b", "--higher", "mfu"], "names none"),
        (["step_time", "--name", "b"], "cannot be read"),
        (["step_time=1", "mfu", "--name", "b"], "METRIC=VALUE"),
    ],
)
def test_nonsense_is_wrong_usage_and_stores_nothing(place: Path, words: list[str], says: str) -> None:
    done = regress(place, "record", *words)
    assert (done.status, done.out) == (2, "")
    assert says in done.err
    assert RunStore(place).all() == []


def test_a_file_is_recorded_once(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"name": "bench", "run_id": "r1", "metrics": {"step_time": [0.1, 0.2, 0.3]}}))
    assert regress(place, "record", str(file)).status == 0
    done = regress(place, "record", str(file))
    assert done.status == 2
    assert "holds a run of this id already" in done.err
    assert regress(place, "record", str(file), "--id", "r2", "--name", "other").status == 0
    assert [(run.run_id, run.key.name) for run in RunStore(place).all()] == [("r1", "bench"), ("r2", "other")]
    assert regress(place, "record", str(file), "--higher", "x").status == 2
    done = regress(place, "record", str(file), "--id", "x" * 65)
    assert (done.status, done.err.partition("=")[0]) == (2, "kpt: --id")


def test_another_unit_than_before_is_refused(place: Path) -> None:
    assert regress(place, "record", "--name", "b", "size=3kg").status == 0
    done = regress(place, "record", "--name", "b", "size=3000g")
    assert done.status == 2
    assert "'kg'" in done.err


def test_the_history_shows_where_a_level_and_an_environment_began(place: Path) -> None:
    slow = [value * 1.2 for value in STEADY]
    add(place, *runs([*STEADY, *slow]), *runs(STEADY, start=50, environment={"torch": "3", "git_commit": "c0ffee" * 6}))
    done = regress(place, "history")
    assert done.status == 0
    marked = [line for line in done.out.splitlines() if "since here" in line]
    assert len(marked) == 1
    assert marked[0].split()[0] == "10"
    assert "severe change: +20.0%" in marked[0]
    assert "environment 2 begins: torch 2 -> 3" in done.out
    assert "c0ffeec0ff" in done.out
    (data,) = json.loads(regress(place, "history", "--json", "--last", "12").out)
    assert (data["metric"], data["unit"], len(data["runs"])) == ("step_time", "s", 12)
    assert data["runs"][2]["environment_changes"] == {"torch": ["2", "3"]}
    (whole,) = json.loads(regress(place, "history", "--json").out)
    assert [run["run"] for run in whole["runs"] if run["change"]] == ["10"]


def test_a_history_is_narrowed_to_a_name_a_key_and_a_metric(place: Path) -> None:
    add(place, *runs(STEADY), *runs(STEADY, start=50, key=replace(KEY, name="other")))
    assert len(json.loads(regress(place, "history", "--json").out)) == 2
    (only,) = json.loads(regress(place, "history", "--json", "--name", "other").out)
    (same,) = json.loads(regress(place, "history", "--json", "--key", only["key"]).out)
    assert only == same
    assert regress(place, "history", "--metric", "mfu").status == 2
    assert regress(place, "history", "--name", "nobody").status == 2
    assert regress(place, "history", "--last", "0").status == 2


def test_an_empty_history_has_nothing_to_show(place: Path) -> None:
    RunStore(place).open()
    done = regress(place, "history")
    assert (done.status, done.out) == (3, "no finished run in this history\n")


def test_names_cannot_colour_a_terminal_or_be_read_as_markup(place: Path) -> None:
    add(place, *runs(STEADY, key=replace(KEY, name="[red]a\x1b[31m\nb")))
    for command in ("history", "doctor"):
        done = regress(place, command)
        assert done.status == 0
        assert "\x1b" not in done.out
        assert "[red]a" in done.out


def test_two_runs_of_unlike_keys_are_set_side_by_side_and_that_is_said(place: Path) -> None:
    slower = replace(
        runs([0.2], start=20)[0], run_id="def", key=replace(KEY, precision="fp8"), environment={"torch": "3"}
    )
    add(place, make("abc"), slower)
    done = regress(place, "compare", "ab", "de")
    assert done.status == 0
    for part in ("+100.0%", "key.precision", "fp8", "environment.torch", "different keys"):
        assert part in done.out
    data = json.loads(regress(place, "compare", "ab", "de", "--json").out)
    assert data["metrics"]["step_time"]["change"] == 1.0
    assert "are equal" in regress(place, "compare", "abc", "abc").out


@pytest.mark.parametrize(("prefix", "says"), [("r", "2 runs begin so: r1, r2"), ("x", "no run of this history")])
def test_a_beginning_of_no_run_or_of_several_is_wrong_usage(place: Path, prefix: str, says: str) -> None:
    add(place, make("r1"), make("r2"))
    done = regress(place, "compare", prefix, "r1")
    assert (done.status, done.out) == (2, "")
    assert says in done.err
