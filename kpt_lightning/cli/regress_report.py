"""``kpt regress report``: the history as one HTML file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kpt_lightning.cli.regress_options import TOO_LITTLE, Store, existing_history

if TYPE_CHECKING:
    from kpt_lightning.tracking.record import RunRecord


def report(
    store: Store = None,
    key: Annotated[str | None, typer.Option("--key", help="Only this run key, or all that begin like this.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Only runs of this name.")] = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="Only so many newest runs of each key.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write the history as one HTML file, with what changed when; it needs no network and no server."""
    from kpt_lightning.errors import ConfigError
    from kpt_lightning.reports.page import render_report
    from kpt_lightning.tracking.acks import all_acks
    from kpt_lightning.tracking.baselines import accepted_runs

    history = existing_history(store)
    records = history.all()
    chosen = _chosen(records, key, name, last)
    if not chosen:
        asked = " and ".join(f"{option} {value}" for option, value in (("--key", key), ("--name", name)) if value)
        why = f"none of {len(records)} runs has {asked}" if records else "it holds no run"
        typer.echo(f"kpt: history={history.place!r}: {why}. No report was written.", err=True)
        raise typer.Exit(TOO_LITTLE)
    page = render_report(chosen, source=history.place, acks=all_acks(history), accepted=accepted_runs(history))
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError("output", str(output), f"cannot be written ({error})", "Give another path") from error
    typer.echo(f"{len(chosen)} runs written to {output}")


def _chosen(records: "list[RunRecord]", key: str | None, name: str | None, last: int | None) -> "list[RunRecord]":
    """The runs that were asked for, in order."""
    by_key: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        digest = record.key.digest
        if digest.startswith(key or "") and name in (None, record.key.name):
            by_key.setdefault(digest, []).append(place)
    places = sorted(place for of_key in by_key.values() for place in (of_key[-last:] if last else of_key))
    return [records[place] for place in places]
