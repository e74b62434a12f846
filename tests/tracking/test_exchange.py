"""Exports hold every run; imports add each once, and say where a file is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking.exchange import FORMAT_VERSION, Imported, export_runs, import_runs
from kpt_lightning.tracking.store import RunStore
from tests.tracking.test_store import make


def store_of(path: Path, *ids: str) -> RunStore:
    store = RunStore(path).open()
    for each in ids:
        store.add(make(each))
    return store


def test_an_export_imported_elsewhere_gives_the_same_runs_and_a_second_time_nothing(tmp_path: Path) -> None:
    first = store_of(tmp_path / "a.sqlite", "1", "2", "3")
    assert export_runs(first, tmp_path / "runs.jsonl") == 3
    second = store_of(tmp_path / "b.sqlite", "2")
    assert import_runs(second, tmp_path / "runs.jsonl") == Imported(("1", "3"), ("2",))
    assert {record.run_id: record for record in second.all()} == {record.run_id: record for record in first.all()}
    assert import_runs(second, tmp_path / "runs.jsonl") == Imported((), ("1", "2", "3"))
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["runs.jsonl"]


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_is_left_out_and_told(tmp_path: Path, cut: int) -> None:
    export_runs(store_of(tmp_path / "a.sqlite", "1", "2"), tmp_path / "runs.jsonl")
    text = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(text[: -1 - cut])
    found = import_runs(RunStore(tmp_path / "b.sqlite"), tmp_path / "runs.jsonl")
    assert found == Imported(("1",), (), torn=True)


def test_a_file_without_its_last_newline_is_whole(tmp_path: Path) -> None:
    export_runs(store_of(tmp_path / "a.sqlite", "1", "2"), tmp_path / "runs.jsonl")
    (tmp_path / "runs.jsonl").write_text((tmp_path / "runs.jsonl").read_text().rstrip("\n"))
    assert import_runs(RunStore(tmp_path / "b.sqlite"), tmp_path / "runs.jsonl") == Imported(("1", "2"), ())


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
    ],
)
def test_a_wrong_file_is_refused_by_its_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "runs.jsonl").write_text(text)
    store = RunStore(tmp_path / "b.sqlite")
    if not says:
        assert import_runs(store, tmp_path / "runs.jsonl") == Imported((), ())
        return
    with pytest.raises(HistoryError) as caught:
        import_runs(store, tmp_path / "runs.jsonl")
    assert says in str(caught.value)
    assert store.all() == []


@pytest.mark.parametrize("make_wrong", [lambda path: None, lambda path: path.write_bytes(b"\xff\xfe\x00"), Path.mkdir])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, make_wrong: Any) -> None:
    make_wrong(tmp_path / "runs.jsonl")
    with pytest.raises(HistoryError, match="cannot be read"):
        import_runs(RunStore(tmp_path / "b.sqlite"), tmp_path / "runs.jsonl")


def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a.sqlite", "1")
    with pytest.raises(HistoryError, match="cannot be written"):
        export_runs(store, tmp_path / "nowhere" / "runs.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HistoryError, match="cannot be written"):
        export_runs(store, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir() if "sqlite" not in path.name) == ["folder"]
