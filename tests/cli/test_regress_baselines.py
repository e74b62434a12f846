"""``kpt regress accept`` and ``ack``: what is pinned, what is refused, and what a check then says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kpt_lightning.tracking.baselines import pinned, pins
from kpt_lightning.tracking.events import author
from kpt_lightning.tracking.store import RunStore
from tests.cli.kpt_command import regress
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_store import KEY

SLOWER = [value * 1.1 for value in STEADY]


@pytest.fixture
def history(tmp_path: Path) -> Path:
    return add(tmp_path / "runs.sqlite", STEADY)


def add(place: Path, values: list[float], **changes: object) -> Path:
    store = RunStore(place)
    for record in runs(values, start=len(store.ids()), **changes):
        store.add(record)
    return place


def test_the_newest_runs_are_pinned_and_judged_by(history: Path) -> None:
    done = regress(history, "accept", "--last", "6", "--reason", "release 1")
    assert (done.status, done.err) == (0, "")
    assert f"6 runs pinned as 'main', {4} to {9}" in done.out
    (baseline,) = pins(RunStore(history))
    assert (baseline.run_ids, baseline.reason, baseline.author) == (tuple("456789"), "release 1", author())
    add(history, SLOWER)
    done = regress(history, "check", "--baseline", "main")
    assert done.status == 1
    assert "pinned as 'main'" in regress(history, "check", "--baseline", "main", "--format", "markdown").out


def test_a_check_by_a_baseline_that_nobody_pinned_is_a_status_of_its_own(history: Path) -> None:
    done = regress(history, "check", "--baseline", "release")
    assert done.status == 3
    assert "kpt regress accept --name release" in done.out


@pytest.mark.parametrize(("limit", "status"), [("minor", 1), ("moderate", 1), ("severe", 0)])
def test_a_base_that_gets_worse_by_the_limit_needs_a_reason(history: Path, limit: str, status: int) -> None:
    regress(history, "accept")
    add(history, SLOWER)
    done = regress(history, "accept", "--limit", limit)
    assert done.status == status
    assert "step_time: moderate regression of +10." in done.out
    assert ("give --reason" in done.err) == (status == 1)
    assert len(pins(RunStore(history))) == (1 if status else 2)
    if status:
        assert regress(history, "accept", "--limit", limit, "--reason", " ").status == 1
        assert regress(history, "accept", "--limit", limit, "--reason", "the new loss costs it").status == 0
        assert pins(RunStore(history))[-1].reason == "the new loss costs it"


def test_a_base_that_moves_with_the_environment_says_so(history: Path) -> None:
    regress(history, "accept")
    add(history, SLOWER, environment={"torch": "3"})
    done = regress(history, "accept")
    assert done.status == 1
    assert "the environment changed: torch 2 -> 3" in done.out


def test_one_key_that_is_refused_keeps_all_keys_as_they_were(history: Path) -> None:
    other = replace(KEY, precision="fp8")
    add(history, STEADY, key=other)
    regress(history, "accept")
    add(history, STEADY)
    add(history, SLOWER, key=other)
    assert regress(history, "accept").status == 1
    assert len(pins(RunStore(history))) == 2
    assert regress(history, "accept", "--key", KEY.digest[:8]).status == 0
    assert len(pins(RunStore(history))) == 3


def test_runs_are_named_by_the_beginning_of_their_ids(tmp_path: Path) -> None:
    history = add(tmp_path / "runs.sqlite", [*STEADY, *STEADY])
    chosen = [option for number in range(13, 18) for option in ("--run", str(number))]
    assert regress(history, "accept", "--name", "release", *chosen).status == 0
    assert pinned(RunStore(history), "release")[KEY.digest].run_ids == ("13", "14", "15", "16", "17")
    done = regress(history, "accept", "--run", "13", "--run", "14")
    assert done.status == 3
    assert "2 runs in one environment; a baseline needs 5" in done.err
    assert regress(history, "accept", "--run", "zz").status == 2
    assert regress(history, "accept", "--key", "zz").status == 2
    assert regress(history, "accept", "--last", "0").status == 2


def test_too_few_runs_are_not_pinned(tmp_path: Path) -> None:
    assert regress(tmp_path / "empty.sqlite", "accept").status == 3
    done = regress(add(tmp_path / "runs.sqlite", STEADY[:4]), "accept")
    assert (done.status, done.out) == (3, "")
    assert "nothing was pinned" in done.err


def test_a_known_regression_passes_and_is_listed(history: Path) -> None:
    add(history, [0.111])
    assert regress(history, "check").status == 1
    done = regress(history, "ack", "step_time", "--name", "m", "--reason", "new loss", "--expires", "14d")
    assert done.status == 0
    assert "m step_time: moderate regression of +10.9%" in done.out
    assert regress(history, "check").status == 0
    (listed,) = json.loads(regress(history, "ack", "--list", "--json").out)
    assert (listed["state"], listed["reason"], listed["author"]) == ("live", "new loss", author())
    assert "new loss" in regress(history, "ack", "--list").out
    add(history, [0.1])
    assert regress(history, "check").status == 0
    (listed,) = json.loads(regress(history, "ack", "--list", "--json").out)
    assert (listed["state"], listed["end"]["run_id"]) == ("recovered", "11")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--name", "m", "--reason", "r", "--expires", "1d"], "at least one metric"),
        (["step_time", "--name", "m", "--expires", "1d"], "--reason"),
        (["step_time", "--name", "m", "--reason", " ", "--expires", "1d"], "--reason"),
        (["step_time", "--name", "m", "--reason", "r"], "--expires"),
        (["step_time", "--name", "m", "--reason", "r", "--expires", "2020-01-01"], "over already"),
        (["mfu", "--name", "m", "--reason", "r", "--expires", "1d"], "regressed: step_time"),
        (["step_time", "--name", "x", "--reason", "r", "--expires", "1d"], "there are: m"),
        (["step_time", "--key", "zz", "--reason", "r", "--expires", "1d"], "no key"),
    ],
)
def test_an_acknowledgement_that_lacks_something_is_wrong_usage(history: Path, arguments: list[str], says: str) -> None:
    add(history, [0.111])
    done = regress(history, "ack", *arguments)
    assert (done.status, done.out) == (2, "")
    assert says in done.err
    assert json.loads(regress(history, "ack", "--list", "--json").out) == []


def test_nothing_is_acknowledged_where_nothing_regressed(history: Path) -> None:
    add(history, [0.1])
    done = regress(history, "ack", "step_time", "--name", "m", "--reason", "r", "--expires", "1d")
    assert done.status == 2
    assert "regressed: nothing" in done.err
    assert "no regression was acknowledged" in regress(history, "ack", "--list").out


def test_a_broken_history_is_unreadable_for_both(tmp_path: Path) -> None:
    place = tmp_path / "runs.sqlite"
    place.write_bytes(b"no database, and long enough to be taken for one" * 100)
    assert regress(place, "accept").status == 4
    assert regress(place, "ack", "--list").status == 4


def test_a_real_process_exits_the_same_way(history: Path) -> None:
    command = [sys.executable, "-m", "kpt_lightning.cli.main", "regress", "accept", "--store", str(history)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*command, "--run", "zz"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
