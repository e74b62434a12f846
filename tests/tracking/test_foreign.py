"""Files that pytest-benchmark 5.3 and asv 0.6 wrote become runs, each once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking.exchange import add_runs
from kpt_lightning.tracking.foreign import read_asv, read_pytest_benchmark
from kpt_lightning.tracking.store import RunStore

DATA = Path(__file__).parent / "data"
PYTEST = DATA / "pytest_benchmark_5.json"


def test_a_benchmark_of_pytest_is_the_median_of_its_rounds() -> None:
    raw = json.loads(PYTEST.read_text())["benchmarks"]
    records = read_pytest_benchmark(PYTEST)
    assert [record.key.name for record in records] == [each["fullname"] for each in raw]
    assert [record.key.device for record in records] == ["AMD EPYC"] * 3
    for record, each in zip(records, raw, strict=True):
        metric, saved = record.metrics["time"], each["stats"].get("data")
        assert (metric.unit, metric.better) == ("s", "lower")
        assert metric.n == (len(saved) if saved else each["stats"]["rounds"])
        if not saved:
            assert metric.median == each["stats"]["median"]
            assert metric.mad == pytest.approx(each["stats"]["iqr"] / 2)
        assert record.environment["host"] == "bench1"
    assert len({record.key.digest for record in records}) == 3


def test_a_benchmark_of_asv_is_one_run_for_each_combination_of_its_parameters() -> None:
    records = {record.key.name: record for record in read_asv(DATA / "asv")}
    assert set(records) == {"b.S.time_sum(n=10)", "b.S.time_sum(n=100)", "b.peakmem_list", "b.track_value"}
    time = records["b.S.time_sum(n=100)"].metrics["time"]
    assert (time.median, time.unit, time.better) == (5.228001100476831e-06, "s", "lower")
    memory = records["b.peakmem_list"].metrics["peak_memory"]
    assert (memory.median, memory.unit) == (27303936, "bytes")
    assert records["b.track_value"].metrics["value"].unit == "widgets"
    assert records["b.track_value"].environment["git_commit"].startswith("86232d67")
    assert records["b.track_value"].created_at.endswith("+00:00")


@pytest.mark.parametrize("read", [lambda: read_pytest_benchmark(PYTEST), lambda: read_asv(DATA / "asv")])
def test_a_second_import_adds_nothing(tmp_path: Path, read: Any) -> None:
    store = RunStore(tmp_path / "runs.sqlite")
    first, second = add_runs(store, read()), add_runs(store, read())
    assert first.known == second.added == ()
    assert first.added == second.known
    assert len(store.all()) == len(first.added) >= 3


def test_what_failed_in_asv_is_left_out(tmp_path: Path) -> None:
    shutil.copytree(DATA / "asv", tmp_path / "asv")
    (path,) = (each for each in (tmp_path / "asv" / "bench1").iterdir() if each.name != "machine.json")
    data = json.loads(path.read_text())
    data["results"]["b.S.time_sum"][0] = [None, float("nan")]
    path.write_text(json.dumps(data))
    assert {record.key.name for record in read_asv(tmp_path / "asv")} == {"b.peakmem_list", "b.track_value"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine_info": {}, "benchmarks": [{}], "datetime": "x"}'])
def test_another_form_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(HistoryError, match=r"out\.json.*form"):
        read_pytest_benchmark(tmp_path / "out.json")


def test_a_place_without_results_is_refused(tmp_path: Path) -> None:
    for read in (read_asv, lambda folder: read_pytest_benchmark(folder / "no.json")):
        with pytest.raises(HistoryError, match="cannot be read"):
            read(tmp_path)
