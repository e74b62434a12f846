"""``kpt regress check``: is the newest run slower than those before it."""

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpt_lightning.cli.regress_options import Store

if TYPE_CHECKING:
    from kpt_lightning.tracking.check import Checked

REGRESSION, TOO_LITTLE = 1, 3
"""Exit status beside 0 and those of ``kpt`` itself."""


class FailOn(StrEnum):
    """From which severity on a regression fails the build, the least first."""

    MINOR = "minor"
    MODERATE = "moderate"
    SEVERE = "severe"


def check(
    store: Store = None,
    new: Annotated[int, typer.Option("--new", min=1, help="How many of the newest runs of each key are judged.")] = 1,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="Judge this one; all by default.")] = None,
    fail_on: Annotated[FailOn, typer.Option("--fail-on", help="From which severity on to exit with 1.")] = FailOn.MINOR,
    as_json: Annotated[bool, typer.Option("--json", help="Print data.")] = False,
) -> None:
    """Judge the newest runs of each key by those before them in the same environment."""
    from kpt_lightning.tracking.check import check_runs
    from kpt_lightning.tracking.store import RunStore

    found = check_runs(RunStore(store).all(), new=new, metrics=metric)
    if as_json:
        typer.echo(json.dumps([_data(each) for each in found], indent=2))
    else:
        _print(found)
    severities = list(FailOn)
    failing = severities[severities.index(fail_on) :]
    if any(each.verdict and each.verdict.severity in failing for each in found):
        raise typer.Exit(REGRESSION)
    if not any(each.judged for each in found):
        raise typer.Exit(TOO_LITTLE)


def _data(checked: "Checked") -> dict[str, Any]:
    verdict = checked.verdict
    finite = verdict is not None and checked.judged
    return {
        "name": checked.key.name, "key": checked.key.digest, "metric": checked.metric, "unit": checked.unit,
        "before": checked.before, "now": checked.now, "note": checked.note,
        "outcome": "no baseline" if verdict is None else verdict.outcome,
        "severity": verdict and verdict.severity, "reason": "no run before" if verdict is None else verdict.reason,
        "shift": verdict.shift if verdict and finite else None,
        "interval": [verdict.interval.low, verdict.interval.high] if verdict and finite else None,
        "runs_needed": verdict and verdict.runs_needed, "baseline_runs": verdict.baseline_runs if verdict else 0,
    }  # fmt: skip


def _print(found: list["Checked"]) -> None:
    from rich.console import Console

    from kpt_lightning.cli.tables import new_table, plain

    table = new_table("Newest runs against those before", "run", "metric", "before", "now", "change", "verdict", "why")
    for checked in found:
        data = _data(checked)
        change = ""
        if data["interval"] is not None:
            low, high = data["interval"]
            change = f"{data['shift']:+.1%} ({low:+.1%} to {high:+.1%})"
        verdict = " ".join(filter(None, (data["severity"] if data["outcome"] == "regression" else "", data["outcome"])))
        why = "; ".join(filter(None, (data["reason"], data["note"])))
        before = "" if data["before"] is None else f"{data['before']:.4g} {data['unit']}"
        now = f"{data['now']:.4g} {data['unit']}"
        table.add_row(*map(plain, (data["name"], data["metric"], before, now, change, verdict, why)))
    Console().print(table if found else "no finished run in this history")
