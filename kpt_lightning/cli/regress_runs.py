"""``kpt regress record``, ``history`` and ``compare``: runs into a history, and what it holds."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpt_lightning.cli.regress_options import TOO_LITTLE, Key, Name, Store, existing_history
from kpt_lightning.errors import ConfigError

if TYPE_CHECKING:
    from kpt_lightning.tracking.measured import MeasuredRun
    from kpt_lightning.tracking.record import RunRecord
    from kpt_lightning.tracking.timeline import Point, Timeline

AsJson = Annotated[bool, typer.Option("--json", help="Print data.")]


def record(
    what: Annotated[list[str], typer.Argument(metavar="METRIC=VALUE[unit]...|FILE.json", help="What was measured.")],
    store: Store = None,
    name: Annotated[str | None, typer.Option("--name", help="Label of the run; runs of one name are compared.")] = None,
    higher: Annotated[list[str] | None, typer.Option("--higher", help="A metric of which more is better.")] = None,
    run_id: Annotated[str | None, typer.Option("--id", help="Unique; made if not given.")] = None,
) -> None:
    """Store a run that was measured elsewhere; device and versions are those of this machine.

    A file holds {"name": "bench", "metrics": {"step_time": [0.11, 0.12], "size": {"value": 3, "unit": "MiB", "better":
    "lower"}}}; and, where wanted, run_id, created_at, config, model, strategy, precision, device, device_count,
    environment, notes.
    """
    from kpt_lightning.tracking.measured import check_unit, to_record
    from kpt_lightning.tracking.store import RunStore

    new = to_record(_measured(what, name, higher or [], run_id))
    history = RunStore(store)
    known = history.all()
    if any(run.run_id == new.run_id for run in known):
        raise ConfigError("run_id", new.run_id, "the history holds a run of this id already", "Give another one")
    check_unit(new, known)
    history.add(new)
    values = ", ".join(f"{name} {metric.median:.6g} {metric.unit}" for name, metric in new.metrics.items())
    typer.echo(f"{new.run_id}: {new.key.name} [{new.key.digest}] on {new.key.device}: {values}")


def _measured(what: list[str], name: str | None, higher: list[str], run_id: str | None) -> "MeasuredRun":
    from pydantic import ValidationError

    from kpt_lightning.tracking.measured import MeasuredRun, parse_metrics, read_measured

    if len(what) == 1 and "=" not in what[0]:
        if higher:
            raise ConfigError("--higher", higher, "a file says that itself", 'Give "better": "higher" in the file')
        fields = dict(read_measured(what[0]))
    else:
        if not name:
            raise ConfigError("--name", name, "must say what these metrics are of", "Give the runs a name")
        fields = {"metrics": parse_metrics(what, higher)}
    fields |= {field: value for field, value in (("name", name), ("run_id", run_id)) if value is not None}
    try:
        return MeasuredRun(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        option = {"run_id": "--id"}.get(str(first["loc"][0]), f"--{first['loc'][0]}")
        raise ConfigError(option, first["input"], first["msg"].lower(), "Give another value") from error


def history(
    store: Store = None,
    metric: Annotated[str | None, typer.Option("--metric", help="step_time, or the first that the runs have.")] = None,
    key: Key = None,
    name: Name = None,
    last: Annotated[int, typer.Option("--last", min=1, help="Show as many newest runs of each key.")] = 30,
    as_json: AsJson = False,
) -> None:
    """The runs of each key, newest last, with the places where the level changed for good."""
    from kpt_lightning.tracking.check import finished_by_key
    from kpt_lightning.tracking.runs_by_key import choose_keys
    from kpt_lightning.tracking.timeline import timeline

    by_key = choose_keys(finished_by_key(existing_history(store).all()), key=key, name=name)
    names = {name for runs in by_key.values() for run in runs for name in run.metrics}
    if metric is not None and by_key and metric not in names:
        rule = f"no run here has it; there are: {', '.join(sorted(names))}"
        raise ConfigError("--metric", metric, rule, "Give one of these")
    found = [timeline(runs, metric or _first_metric(runs[-1])) for runs in by_key.values()]
    lines = [each for each in found if each is not None]
    if as_json:
        typer.echo(json.dumps([_timeline_data(each, last) for each in lines], indent=2))
    else:
        for each in lines:
            _print_timeline(each, last)
        if not lines:
            typer.echo("no finished run in this history")
    if not lines:
        raise typer.Exit(TOO_LITTLE)


def _first_metric(run: "RunRecord") -> str:
    return "step_time" if "step_time" in run.metrics else next(iter(run.metrics), "")


def _timeline_data(line: "Timeline", last: int) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "key": line.key.digest, "name": line.key.name, "metric": line.metric, "unit": line.unit, "better": line.better,
        "key_fields": asdict(line.key), "runs": [_point_data(point) for point in line.points[-last:]],
    }  # fmt: skip


def _point_data(point: "Point") -> dict[str, Any]:
    from math import isfinite

    from kpt_lightning.tracking.fingerprint import CODE_KEY

    change = point.change
    numbers = [] if change is None else [change.shift, change.interval.low, change.interval.high]
    shift, *interval = [each if isfinite(each) else None for each in numbers] or [None]
    return {
        "run": point.run.run_id, "created_at": point.run.created_at, "value": point.value,
        "commit": point.run.environment.get(CODE_KEY), "environment": point.environment,
        "environment_changes": point.environment_changes,
        "change": change and {"shift": shift, "interval": interval, "severity": change.severity,
                              "confidence": change.confidence},
    }  # fmt: skip


def _print_timeline(line: "Timeline", last: int) -> None:
    from rich.console import Console

    from kpt_lightning.cli.tables import new_table, plain
    from kpt_lightning.reports.sparkline import sparkline
    from kpt_lightning.reports.words import level, visible

    shown = line.points[-last:]
    bars = sparkline([point.value for point in shown])
    key = line.key
    kind = ", ".join(filter(None, (f"{key.device_count} x {key.device}", key.strategy, key.precision)))
    head, metric = visible(f"{key.name} [{key.digest}]: {kind}"), visible(line.metric)
    title = plain(f"{head}\n{metric}, {len(shown)} of {len(line.points)} runs\n{bars}")
    table = new_table(title, "run", "when (UTC)", "commit", "env", plain(metric), "", "")
    for point, bar in zip(shown, bars, strict=True):
        if point.environment_changes:
            table.add_row(
                "", "", "", str(point.environment), "", "", plain(visible(_environment_text(point))), style="yellow"
            )
        data = _point_data(point)
        cells = (
            point.run.run_id[:12], point.run.created_at[:16].replace("T", " "), (data["commit"] or "")[:10],
            str(point.environment), level(point.value, line.unit), bar, _change_text(point),
        )  # fmt: skip
        table.add_row(*map(plain, map(visible, cells)))
    Console().print(table)


def _environment_text(point: "Point") -> str:
    changes = (f"{name} {old or 'none'} -> {new or 'none'}" for name, (old, new) in point.environment_changes.items())
    return f"environment {point.environment} begins: {', '.join(changes)}"


def _change_text(point: "Point") -> str:
    change = point.change
    if change is None:
        return ""
    interval = f" ({change.interval.low:+.1%} to {change.interval.high:+.1%})" if change.interval.finite else ""
    return f"<- {change.severity or 'small'} change: {change.shift:+.1%}{interval} since here"


def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, or its beginning.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The run to set beside it.")],
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Two runs side by side: metrics, environment, plan. Whether a difference is noise, kpt regress check says."""
    from kpt_lightning.reports.side_by_side import side_by_side

    runs = existing_history(store)
    found = side_by_side(runs.find(first), runs.find(second))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console

    from kpt_lightning.cli.tables import new_table, plain
    from kpt_lightning.reports.words import level, percent, visible

    left, right = (plain(visible(each[:12])) for each in found["runs"])
    table = new_table(f"{left} and {right}", "metric", left, right, "difference")
    for name, row in found["metrics"].items():
        values = ["" if row[side] is None else level(row[side], row["units"][at]) for at, side in enumerate("ab")]
        change = "" if row["change"] is None else percent(row["change"])
        table.add_row(*map(plain, (visible(name), *values, change)))
    Console().print(table)
    changed = new_table("What else is not equal", "", left, right)
    for name, (old, new) in found["differences"].items():
        changed.add_row(*map(plain, (visible(name), _text(old), _text(new))))
    Console().print(changed if found["differences"] else "environment, key, settings and plan are equal")
    if not found["same_key"]:
        typer.echo("The runs have different keys: they are not runs of the same thing.")


def _text(value: object) -> str:
    from kpt_lightning.reports.words import visible

    return "none" if value is None else visible(value if isinstance(value, str) else json.dumps(value))
