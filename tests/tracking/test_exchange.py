"""Exports hold every run; imports add each once, and say where a file is wrong."""

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking.acks import Ack, AckEnd, acknowledge, all_acks, end_acks, new_ack
from kpt_lightning.tracking.baselines import Baseline, new_baseline, pin, pinned, pins
from kpt_lightning.tracking.events import utc_now
from kpt_lightning.tracking.exchange import FORMAT_VERSION, Exported, Imported, export_history, import_history
from kpt_lightning.tracking.store import RunStore
from tests.tracking.test_store import KEY, make


def store_of(path: Path, *ids: str) -> RunStore:
    store = RunStore(path).open()
    for each in ids:
        store.add(make(each))
    return store


def test_an_export_imported_elsewhere_gives_the_same_runs_and_a_second_time_nothing(tmp_path: Path) -> None:
    first = store_of(tmp_path / "a.sqlite", "1", "2", "3")
    assert export_history(first, tmp_path / "runs.jsonl") == Exported(3, 0, 0)
    second = store_of(tmp_path / "b.sqlite", "2")
    assert import_history(second, tmp_path / "runs.jsonl") == Imported(("1", "3"), ("2",))
    assert {record.run_id: record for record in second.all()} == {record.run_id: record for record in first.all()}
    assert import_history(second, tmp_path / "runs.jsonl") == Imported((), ("1", "2", "3"))
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["runs.jsonl"]


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_is_left_out_and_told(tmp_path: Path, cut: int) -> None:
    export_history(store_of(tmp_path / "a.sqlite", "1", "2"), tmp_path / "runs.jsonl")
    text = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(text[: -1 - cut])
    found = import_history(RunStore(tmp_path / "b.sqlite"), tmp_path / "runs.jsonl")
    assert found == Imported(("1",), (), torn=True)


def test_a_file_without_its_last_newline_is_whole(tmp_path: Path) -> None:
    export_history(store_of(tmp_path / "a.sqlite", "1", "2"), tmp_path / "runs.jsonl")
    (tmp_path / "runs.jsonl").write_text((tmp_path / "runs.jsonl").read_text().rstrip("\n"))
    assert import_history(RunStore(tmp_path / "b.sqlite"), tmp_path / "runs.jsonl") == Imported(("1", "2"), ())


def decided(store: RunStore) -> tuple[list[Baseline], list[Ack]]:
    return pins(store), all_acks(store)


@pytest.fixture
def judged(tmp_path: Path) -> RunStore:
    """A history with a pin that a later one took the place of, an acknowledgement that ended and one that lives."""
    store = store_of(tmp_path / "a.sqlite", "1", "2")
    for reason in ("first", "second"):
        pin(store, [new_baseline("main", store.all(), reason)])
    for metric in ("step_time", "peak_memory"):
        acknowledge(store, [ack_of(metric)])
    end = AckEnd(kind="recovered", created_at="2026-01-02T00:00:00.000+00:00", run_id="2")
    end_acks(store, [(all_acks(store)[0], end)])
    return store


def ack_of(metric: str) -> Ack:
    return new_ack(
        key_digest=KEY.digest, run_name="m", metric=metric, severity="minor", shift=0.03, base_runs=["1"],
        reason="known", expires=utc_now() + timedelta(days=1),
    )  # fmt: skip


def test_baselines_and_acknowledgements_come_along_once(judged: RunStore, tmp_path: Path) -> None:
    file, other = tmp_path / "runs.jsonl", RunStore(tmp_path / "b.sqlite")
    assert export_history(judged, file) == Exported(2, 2, 2)
    assert import_history(other, file) == Imported(("1", "2"), (), baselines=2, acks=2)
    assert decided(other) == decided(judged)
    assert [ack.state() for ack in all_acks(other)] == ["recovered", "live"]
    assert import_history(other, file) == Imported((), ("1", "2"))
    assert import_history(judged, file) == Imported((), ("1", "2"))
    assert decided(other) == decided(judged)


def test_an_older_decision_does_not_take_the_place_of_a_later_one(judged: RunStore, tmp_path: Path) -> None:
    export_history(judged, tmp_path / "runs.jsonl")
    other = store_of(tmp_path / "b.sqlite", "1", "2")
    time.sleep(0.005)
    pin(other, [new_baseline("main", other.all(), "third")])
    acknowledge(other, [ack_of("step_time")])
    done = import_history(other, tmp_path / "runs.jsonl")
    assert (done.baselines, done.acks, done.superseded) == (0, 1, 3)
    assert pinned(other, "main")[KEY.digest].reason == "third"
    assert {ack.metric: ack.state() for ack in all_acks(other)} == {"step_time": "live", "peak_memory": "live"}


def test_an_end_comes_after_its_acknowledgement_was_known(judged: RunStore, tmp_path: Path) -> None:
    export_history(judged, tmp_path / "old.jsonl")
    other = RunStore(tmp_path / "b.sqlite")
    import_history(other, tmp_path / "old.jsonl")
    end = AckEnd(kind="worsened", created_at="2026-01-03T00:00:00.000+00:00", run_id="2")
    end_acks(judged, [(all_acks(judged)[1], end)])
    export_history(judged, tmp_path / "new.jsonl")
    import_history(other, tmp_path / "new.jsonl")
    assert [ack.state() for ack in all_acks(other)] == ["recovered", "worsened"]


def test_a_file_of_version_1_is_read(tmp_path: Path) -> None:
    lines = [{"kpt_runs": 1}, make("1").to_dict(), make("2").to_dict()]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = RunStore(tmp_path / "b.sqlite")
    assert import_history(store, tmp_path / "runs.jsonl") == Imported(("1", "2"), ())
    assert store.all() == [make("1"), make("2")]


HEAD = json.dumps({"kpt_runs": FORMAT_VERSION})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ""),
        ('{"a": 1}\n', "line 1: does not begin an export"),
        ("[1]\n", "line 1: does not begin an export"),
        (json.dumps({"kpt_runs": FORMAT_VERSION + 1}) + "\n", "line 1: is of a newer version"),
        (f"{HEAD}\n{{broken\n{HEAD}\n", "line 2: is no JSON"),
        (f"{HEAD}\n[1]\n", "line 2: holds no run"),
        (f'{HEAD}\n{{"run_id": "7"}}\n', "run='7': its record does not have the form"),
        (f'{HEAD}\n{{"kind": "plan"}}\n', "line 2: is of a kind that this version does not know ('plan')"),
        (f'{HEAD}\n{{"kind": "baseline", "name": "main"}}\n', "line 2: does not have the form of this version"),
        (f'{HEAD}\n{{"kind": "acknowledged", "metric": 3}}\n', "line 2: does not have the form of this version"),
        (f'{HEAD}\n{{"kind": "recovered", "ack_id": "a", "by": "me"}}\n', "unknown: by"),
    ],
)
def test_a_wrong_file_is_refused_by_its_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "runs.jsonl").write_text(text)
    store = RunStore(tmp_path / "b.sqlite")
    if not says:
        assert import_history(store, tmp_path / "runs.jsonl") == Imported((), ())
        return
    with pytest.raises(HistoryError) as caught:
        import_history(store, tmp_path / "runs.jsonl")
    assert says in str(caught.value)
    assert store.all() == []


@pytest.mark.parametrize("make_wrong", [lambda path: None, lambda path: path.write_bytes(b"\xff\xfe\x00"), Path.mkdir])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, make_wrong: Any) -> None:
    make_wrong(tmp_path / "runs.jsonl")
    with pytest.raises(HistoryError, match="cannot be read"):
        import_history(RunStore(tmp_path / "b.sqlite"), tmp_path / "runs.jsonl")


def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a.sqlite", "1")
    with pytest.raises(HistoryError, match="cannot be written"):
        export_history(store, tmp_path / "nowhere" / "runs.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HistoryError, match="cannot be written"):
        export_history(store, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir() if "sqlite" not in path.name) == ["folder"]
