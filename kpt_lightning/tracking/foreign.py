"""Results of pytest-benchmark and asv as runs, one for each benchmark and commit, to begin a history with.

Sources:
    pytest-benchmark: https://pytest-benchmark.readthedocs.io/en/latest/usage.html (``--benchmark-json``)
    asv: https://asv.readthedocs.io/en/latest/dev.html#benchmark-suite-layout-and-file-formats
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking.fingerprint import CODE_KEY
from kpt_lightning.tracking.record import Metric, RunKey, RunRecord, digest

ASV_METRICS = {"time": "time", "memory": "memory", "peakmemory": "peak_memory", "track": "value"}
"""Kind of asv benchmark -> name of the metric; of all of them asv takes less for better."""

_ASV_UNITS = {"seconds": "s"}


def read_pytest_benchmark(path: str | Path) -> list[RunRecord]:
    """The benchmarks of one file of ``pytest --benchmark-json``; the metric is ``time``, in seconds.

    Raises:
        HistoryError: The file cannot be read, or has another form.
    """
    path = Path(path)
    records: list[RunRecord] = _read(path, lambda: list(_of_pytest_benchmark(_json(path))))
    return records


def read_asv(folder: str | Path) -> list[RunRecord]:
    """All results in asv's results directory, oldest first; benchmarks that failed are left out.

    Raises:
        HistoryError: The directory or one of its files cannot be read, or has another form.
    """
    folder = Path(folder)
    kinds = _read(folder / "benchmarks.json", lambda: _json(folder / "benchmarks.json"))
    records: list[RunRecord] = []
    for path in sorted(folder.glob("*/*.json")):
        if path.name != "machine.json":
            records += _read(path, lambda path=path: list(_of_asv(_json(path), kinds)))  # type: ignore[misc]
    return sorted(records, key=lambda record: record.created_at)


def _read(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError as error:
        raise HistoryError(f"import={str(path)!r}: cannot be read ({error}). Check the path.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise HistoryError(
            f"import={str(path)!r}: does not have the form of pytest-benchmark's or asv's results ({error!r}). Check "
            "the path, or make the file anew."
        ) from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _of_pytest_benchmark(data: Mapping[str, Any]) -> Iterator[RunRecord]:
    machine, commit = data["machine_info"], data.get("commit_info") or {}
    for benchmark in data["benchmarks"]:
        key = RunKey(
            name=benchmark["fullname"], model="", config=digest(benchmark.get("params")), device=_processor(machine),
            device_count=1, strategy="pytest-benchmark", precision="",
        )  # fmt: skip
        metric = _timed(benchmark["stats"])
        if metric is None:
            continue
        environment = {"python": machine["python_version"], "host": machine["node"], CODE_KEY: commit.get("id")}
        yield _record(key, {"time": metric}, environment, datetime.fromisoformat(data["datetime"]))


def _timed(stats: Mapping[str, Any]) -> Metric | None:
    """From all rounds where they were saved, else from their summary."""
    if stats.get("data"):
        return Metric.of(stats["data"], "s", "lower")
    # Half of the quartiles' distance is the deviation that half of the rounds stay below.
    return _metric(stats["median"], "s", int(stats["rounds"]), stats["iqr"])


def _of_asv(data: Mapping[str, Any], kinds: Mapping[str, Any]) -> Iterator[RunRecord]:
    columns, machine = data["result_columns"], data["params"]
    when = datetime.fromtimestamp(data["date"] / 1000, UTC)
    environment = {"host": machine["machine"], CODE_KEY: data["commit_hash"], "python": data["python"]}
    environment |= {name: version for name, version in data["requirements"].items() if version}
    for name, row in data["results"].items():
        found, kind = dict(zip(columns, row, strict=False)), kinds.get(name, {})
        for number, title in enumerate(_titles(name, found.get("params") or [], kind.get("param_names", []))):
            key = RunKey(
                name=title, model="", config=digest([found.get("version"), title]), device=machine["cpu"],
                device_count=1, strategy="asv", precision="",
            )  # fmt: skip
            low, high = (_at(found.get(column), number) for column in ("stats_q_25", "stats_q_75"))
            metric = _metric(
                _at(found["result"], number), _ASV_UNITS.get(kind.get("unit", ""), kind.get("unit", "1")),
                int(_at(found.get("stats_repeat"), number) or 1), None if low is None or high is None else high - low,
            )  # fmt: skip
            if metric is not None:
                yield _record(key, {ASV_METRICS.get(kind.get("type", ""), "value"): metric}, environment, when)


def _titles(name: str, params: Sequence[Sequence[str]], names: Sequence[str]) -> list[str]:
    """One for each combination of parameters, in the order of the results."""
    if not params:
        return [name]
    labels = [names[place] if place < len(names) else f"param{place + 1}" for place in range(len(params))]
    combined = (zip(labels, values, strict=True) for values in itertools.product(*params))
    pairs = ([f"{label}={value}" for label, value in each] for each in combined)
    return [f"{name}({', '.join(each)})" for each in pairs]


def _at(values: Sequence[float | None] | None, number: int) -> float | None:
    return None if values is None or number >= len(values) else values[number]


def _metric(value: float | None, unit: str, n: int, quartiles: float | None) -> Metric | None:
    if value is None or not math.isfinite(value):
        return None
    finite = quartiles is not None and math.isfinite(quartiles) and n > 1
    mad = quartiles / 2 if finite and quartiles is not None else None
    return Metric(median=float(value), unit=unit, better="lower", n=n, n_effective=float(n), mad=mad)


def _record(
    key: RunKey, metrics: Mapping[str, Metric], environment: Mapping[str, str | None], when: datetime
) -> RunRecord:  # fmt: skip
    created = when.astimezone(UTC).isoformat()
    known = {name: str(value) for name, value in environment.items() if value}
    # The same file gives the same ids, so that a second import adds nothing.
    run_id = digest([key.digest, created, known])
    return RunRecord(
        run_id=run_id, created_at=created, key=key, status="finished", metrics=metrics, environment=known,
        notes=(f"imported from {key.strategy}",),
    )  # fmt: skip


def _processor(machine: Mapping[str, Any]) -> str:
    return str((machine.get("cpu") or {}).get("brand_raw") or machine.get("processor") or machine["machine"])
