"""What was measured elsewhere is taken in one unit for each quantity, and nonsense is refused by its name."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.tracking.fingerprint import environment
from kpt_lightning.tracking.measured import MeasuredRun, check_unit, parse_metrics, read_measured, to_metric, to_record
from kpt_lightning.tracking.record import Metric


@pytest.mark.parametrize(
    ("word", "name", "value", "unit", "better"),
    [
        ("step_time=0.5", "step_time", 0.5, "s", "lower"),
        ("step_time=12.5ms", "step_time", 0.0125, "s", "lower"),
        ("step_time=2.5e2us", "step_time", 2.5e-4, "s", "lower"),
        ("data_wait=+1.5 min", "data_wait", 90.0, "s", "lower"),
        ("tokens_per_second=1_000", "tokens_per_second", 1000.0, "tokens/s", "higher"),
        ("mfu=41%", "mfu", 0.41, "1", "higher"),
        ("peak_memory=1.5GiB", "peak_memory", 1.5 * 2**30, "bytes", "lower"),
        ("peak_memory=80GB", "peak_memory", 8e10, "bytes", "lower"),
        ("final_loss=-.5", "final_loss", -0.5, "1", "lower"),
        ("images=17images/s", "images", 17.0, "images/s", "lower"),
    ],
)
def test_a_word_is_read_in_the_unit_that_is_stored(word: str, name: str, value: float, unit: str, better: str) -> None:
    ((found, given),) = parse_metrics([word]).items()
    metric = to_metric(found, given)
    assert (found, metric.unit, metric.better) == (name, unit, better)
    assert metric.median == pytest.approx(value, rel=1e-12)


def test_more_is_better_where_it_is_said() -> None:
    found = parse_metrics(["images=17", "step_time=1"], ["images"])
    assert [to_metric(name, given).better for name, given in found.items()] == ["higher", "lower"]
    with pytest.raises(ConfigError, match="--higher='imags'"):
        parse_metrics(["images=17"], ["imags"])


@pytest.mark.parametrize("word", ["", "step_time", "=1", "step_time=", "step_time=fast", "1x=2", "step_time=ms"])
def test_a_word_of_another_form_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="METRIC=VALUE"):
        parse_metrics([word])


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("step_time=nan", "finite"), ("step_time=inf", "finite"), ("x=-Infinity", "finite"), ("x=1e999", "finite"),
        ("step_time=-1ms", "negative"), ("peak_memory=-1", "negative"), ("tokens_per_second=-1", "negative"),
        ("step_time=1GiB", "must be one of"), ("mfu=3s", "must be one of"), ("step_time=1parsec", "must be one of"),
    ],
)  # fmt: skip
def test_a_value_that_nothing_can_have_is_refused(word: str, says: str) -> None:
    ((name, given),) = parse_metrics([word]).items()
    with pytest.raises(ConfigError, match=says):
        to_metric(name, given)


def test_a_metric_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        parse_metrics(["x=1", "x=2"])


def test_the_surroundings_are_those_of_this_machine() -> None:
    record = to_record(MeasuredRun(name="bench", metrics={"step_time": 0.5}))
    assert record.key.device == detect().primary.name
    assert environment().items() <= record.environment.items()
    assert (record.status, record.key.name, record.key.device_count) == ("finished", "bench", 1)


def write(path: Path, **changes: Any) -> Path:
    data = {
        "name": "bench",
        "metrics": {"step_time": [0.1, 0.2, 0.4], "x": {"value": 3, "better": "higher"}},
        **changes,
    }
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))
    return path


def test_a_file_holds_more_than_a_command_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.json", run_id="r1", created_at="2026-01-01T02:00:00+02:00", config={"batch": 8}, device="H200",
        device_count=8, precision="fp8", strategy="fsdp2", model="llama", environment={"torch": "9"}, notes=["by hand"],
    )  # fmt: skip
    record = to_record(read_measured(path))
    assert record.metrics["step_time"].median == 0.2
    assert record.metrics["step_time"].n == 3
    assert record.metrics["x"].better == "higher"
    assert (record.run_id, record.created_at) == ("r1", "2026-01-01T00:00:00.000+00:00")
    assert (record.key.device, record.key.device_count, record.environment["torch"]) == ("H200", 8, "9")
    assert record.notes[-1] == "by hand"
    other = to_record(read_measured(write(path, config={"batch": 16})))
    assert other.key.config != record.key.config


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ""}, "name"), ({"metrics": {}}, "metrics"), ({"device_count": 0}, "device_count"),
        ({"sped": 1}, "sped"), ({"metrics": {"x": "fast"}}, "metrics"), ({"metrics": {"x": {"valeu": 1}}}, "metrics"),
        ({"run_id": "x" * 65}, "run_id"), ({"created_at": "noon"}, "created_at"), ({"metrics": {"x": []}}, "x"),
        ({"metrics": {"x": math.nan}}, "x"), ({"config": {"lr": math.inf}}, "config"), ({"metrics": {"x": True}}, "x"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_its_field(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_record(read_measured(write(tmp_path / "run.json", **changes)))
    assert field in caught.value.field


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000, b"null"])
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ConfigError):
        read_measured(tmp_path / "run.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_measured(tmp_path / "missing.json")


def test_runs_of_a_key_keep_their_units() -> None:
    old = to_record(MeasuredRun(name="bench", metrics={"x": 1.0}))
    new = replace(old, metrics={"x": Metric(median=1.0, unit="kg", better="lower")})
    check_unit(old, [old])
    check_unit(new, [])
    with pytest.raises(ConfigError, match=r"runs of this key have it in '1'"):
        check_unit(new, [old])
