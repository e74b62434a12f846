"""A run that was measured elsewhere: its metrics from a command line or a file, its surroundings from this machine."""

import json
import math
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kpt_lightning.errors import ConfigError
from kpt_lightning.tracking.events import utc_now
from kpt_lightning.tracking.fingerprint import environment
from kpt_lightning.tracking.record import Metric, RunKey, RunRecord, digest

UNITS = {
    "ns": (1e-9, "s"), "us": (1e-6, "s"), "ms": (1e-3, "s"), "s": (1.0, "s"), "min": (60.0, "s"), "h": (3600.0, "s"),
    "bytes": (1.0, "bytes"), "B": (1.0, "bytes"), "kB": (1e3, "bytes"), "MB": (1e6, "bytes"), "GB": (1e9, "bytes"),
    "KiB": (2.0**10, "bytes"), "MiB": (2.0**20, "bytes"), "GiB": (2.0**30, "bytes"), "%": (0.01, "1"),
}  # fmt: skip
"""Unit that a person writes -> factor and unit that is stored: one unit for each quantity, as the recorder has it."""

KNOWN = {
    "step_time": ("s", "lower"), "data_wait": ("s", "lower"), "first_step_time": ("s", "lower"),
    "tokens_per_second": ("tokens/s", "higher"), "samples_per_second": ("samples/s", "higher"), "mfu": ("1", "higher"),
    "peak_memory": ("bytes", "lower"), "reserved_memory": ("bytes", "lower"), "final_loss": ("1", "lower"),
}  # fmt: skip
"""Unit and better direction of the recorder's own metrics."""

_ASSIGNMENT = re.compile(
    r"""(?P<name>[a-z_][\w.-]*) = (?P<value>[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)? | [+-]?(?:nan|inf(?:inity)?))
    (?P<unit>.*)""",
    re.IGNORECASE | re.VERBOSE,
)


class MeasuredMetric(BaseModel):
    """One metric of a file: a value, or the values of its steps."""

    model_config = ConfigDict(extra="forbid", strict=True)
    value: float | list[float]
    unit: str | None = None
    better: Literal["lower", "higher"] | None = None


class MeasuredRun(BaseModel):
    """A run as a file of ``kpt regress record`` has it; what is not given is detected or unknown.

    Attributes:
        name: Label of the run.
        metrics: Name to a value, or to an object with ``value``, ``unit`` and ``better``.
        run_id: Unique; made if not given.
        created_at: UTC time, ISO 8601; now if not given.
        config: What makes runs unlike; part of the key.
        model: Fingerprint or name of the model; part of the key.
        strategy: Of distributing; part of the key.
        precision: Part of the key.
        device: Name of the device; detected if not given.
        device_count: Processes that worked together.
        environment: Facts to add to those of this machine; they win.
        notes: For the reader.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(min_length=1)
    metrics: dict[str, MeasuredMetric | float | list[float]] = Field(min_length=1)
    run_id: str | None = Field(default=None, min_length=1, max_length=64)
    created_at: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    model: str = ""
    strategy: str = ""
    precision: str = ""
    device: str | None = None
    device_count: int = Field(default=1, ge=1)
    environment: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


def read_measured(path: str | Path) -> MeasuredRun:
    """The run of a JSON file.

    Raises:
        ConfigError: It cannot be read, is no JSON, or a field is unknown, missing or of the wrong type.
    """
    path = Path(path)
    try:
        return MeasuredRun.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        rule = f"{path}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise ConfigError(where, first["input"], rule, "See kpt regress record --help") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("FILE", str(path), f"cannot be read as JSON ({error})", "Check the path") from error


def parse_metrics(assignments: Sequence[str], higher: Collection[str] = ()) -> dict[str, MeasuredMetric]:
    """Metrics from words such as ``step_time=12.5ms``.

    Args:
        assignments: ``METRIC=VALUE`` with an optional unit at the end.
        higher: Names of metrics of which more is better.

    Raises:
        ConfigError: A word has another form, a metric comes twice, or ``higher`` names one that is not given.
    """
    found: dict[str, MeasuredMetric] = {}
    for word in assignments:
        match = _ASSIGNMENT.fullmatch(word.strip())
        if match is None:
            raise ConfigError("METRIC", word, "must have the form METRIC=VALUE[unit]", "Write step_time=12.5ms")
        name = match["name"]
        if name in found:
            raise ConfigError(name, word, "is given twice", "Give one value, or a list of steps in a file")
        better: Literal["higher"] | None = "higher" if name in higher else None
        found[name] = MeasuredMetric(value=float(match["value"]), unit=match["unit"].strip() or None, better=better)
    for name in higher:
        if name not in found:
            raise ConfigError(
                "--higher", name, f"names none of {', '.join(found) or 'no metric'}", "Check its spelling"
            )
    return found


def to_record(run: MeasuredRun) -> RunRecord:
    """The record of a finished run; device and versions of this machine are looked up where not given.

    Raises:
        ConfigError: A value is not finite, or negative where no negative value exists, or ``created_at`` is no time.
    """
    from kpt_lightning.hardware import detect

    try:
        config = digest(run.config)
    except ValueError as error:
        raise ConfigError("config", run.config, f"must be JSON ({error})", "Leave out what is not finite") from error
    profile = detect()
    driver = profile.versions.get("driver")
    metrics = {name: to_metric(name, given) for name, given in run.metrics.items()}
    key = RunKey(
        name=run.name, model=run.model, config=config, device=run.device or profile.primary.name,
        device_count=run.device_count, strategy=run.strategy, precision=run.precision,
    )  # fmt: skip
    return RunRecord(
        run_id=run.run_id or uuid.uuid4().hex, created_at=_when(run.created_at), key=key, status="finished",
        metrics=metrics, environment=environment(({"driver": driver} if driver else {}) | run.environment),
        details={"config": run.config, "clock": "measured elsewhere"}, notes=("recorded by hand", *run.notes),
    )  # fmt: skip


def to_metric(name: str, given: "MeasuredMetric | float | list[float]") -> Metric:
    """One metric in the unit that is stored.

    Raises:
        ConfigError: As :func:`to_record`.
    """
    given = given if isinstance(given, MeasuredMetric) else MeasuredMetric(value=given)
    known_unit, known_better = KNOWN.get(name, ("1", "lower"))
    factor, unit = UNITS.get(given.unit, (1.0, given.unit)) if given.unit else (1.0, known_unit)
    if name in KNOWN and unit != known_unit:
        accepted = [known_unit, *(each for each, (_, stored) in UNITS.items() if stored == known_unit)]
        rule = f"must be one of {', '.join(dict.fromkeys(accepted))} for {name}"
        raise ConfigError(f"{name}, unit", given.unit, rule, "Convert the value, or give the metric another name")
    values = [each * factor for each in (given.value if isinstance(given.value, list) else [given.value])]
    for value in values:
        _check_value(name, value, unit)
    metric = Metric.of(values, unit, given.better or known_better)
    if metric is None:
        raise ConfigError(name, given.value, "must hold a value", "Leave the metric out")
    return metric


def check_unit(record: RunRecord, known: Sequence[RunRecord]) -> None:
    """Refuse a metric in another unit or direction than in the newest run of the same key.

    Raises:
        ConfigError: One is.
    """
    newest: Mapping[str, Metric] = next((run.metrics for run in reversed(known) if run.key == record.key), {})
    for name, metric in record.metrics.items():
        before = newest.get(name)
        if before is not None and (before.unit, before.better) != (metric.unit, metric.better):
            rule = f"runs of this key have it in {before.unit!r}, {before.better} is better"
            given = f"{metric.unit}, {metric.better} is better"
            raise ConfigError(name, given, rule, "Give the same unit and direction, or another --name")


def _check_value(name: str, value: float, unit: str) -> None:
    if not math.isfinite(value):
        raise ConfigError(name, value, "must be a finite number", "Leave out what could not be measured")
    if value < 0.0 and (unit in ("s", "bytes") or unit.endswith("/s")):
        raise ConfigError(name, value, f"cannot be negative in {unit}", "Check how it was measured")


def _when(text: str | None) -> str:
    if text is None:
        return utc_now().isoformat(timespec="milliseconds")
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError("created_at", text, "must be a time by ISO 8601", "Write 2027-01-31T12:00:00+00:00") from None
    found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    return found.isoformat(timespec="milliseconds")
