"""``kpt regress doctor``: can the history be trusted, and what could be seen by it."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from kpt_lightning.cli.regress_options import Store, existing_history
from kpt_lightning.errors import HistoryError

if TYPE_CHECKING:
    from rich.table import Table

    from kpt_lightning.tracking.health import Health


def doctor(store: Store = None, as_json: Annotated[bool, typer.Option("--json", help="Print data.")] = False) -> None:
    """Look at the history itself: integrity, noise, what the gate could see, acknowledgements."""
    from kpt_lightning.tracking.health import examine

    found = examine(existing_history(store))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)
    if found.integrity not in ("ok", "left to the server"):
        raise HistoryError(
            f"history={found.place!r}: SQLite finds it damaged ({found.integrity}). Export what can be read with "
            "kpt regress export, or restore a backup."
        )


def _print(found: "Health") -> None:
    from rich.console import Console

    console = Console()
    journal = f", journal {found.journal_mode}" if found.journal_mode else ""
    journal += ", read-only" if found.read_only else ""
    runs = sum(sum(key.statuses.values()) for key in found.keys)
    pinned = ", ".join(f"{name} ({count} keys)" for name, count in found.baselines.items()) or "none"
    lines = [
        f"history: {found.place}: {runs} runs, schema {found.schema_version}, integrity {found.integrity}{journal}",
        f"baselines: {pinned}",
    ]
    console.print("\n".join(lines), markup=False, highlight=False)
    if found.keys:
        console.print(_table(found))
    for problem in found.problems:
        console.print(f"problem: {problem}", markup=False, highlight=False)
    for ack in found.live_acks:
        soon = ", soon" if ack.ack_id in found.expiring_acks else ""
        text = f"acknowledged: {ack.run_name} {ack.metric} until {ack.expires_at[:16]} UTC{soon}: {ack.reason}"
        console.print(text, markup=False, highlight=False)


def _table(found: "Health") -> "Table":
    from kpt_lightning.cli.tables import new_table, plain
    from kpt_lightning.reports.words import level, visible
    from kpt_lightning.tracking.health import NEW_RUNS

    seen = [f"seen by {count} new run{'s' if count > 1 else ''}" for count in NEW_RUNS]
    table = new_table("Keys", "name", "key", "runs", "metric", "level", "noise", *seen)
    for key in found.keys:
        statuses = ", ".join(f"{count} {status}" for status, count in key.statuses.items())
        few = "" if key.judgeable else f"; {key.comparable} comparable, too few to judge by"
        head = [visible(key.key.name), key.key.digest, statuses + few]
        for metric in key.metrics:
            usual = "" if metric.level is None else level(metric.level, metric.unit)
            noise = "" if metric.noise is None else f"{metric.noise:.2%}"
            shifts = [f"±{metric.visible[count]:.1%}" if count in metric.visible else "" for count in NEW_RUNS]
            table.add_row(*map(plain, (*head, visible(metric.metric), usual, noise, *shifts)))
            head = ["", "", ""]
        if not key.metrics:
            table.add_row(*map(plain, (*head, "", "", "", *("" for _ in NEW_RUNS))))
    return table
