"""``kpt regress export`` and ``import``: the history as a file, and files of other tools."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kpt_lightning.cli.regress_options import Store, existing_history


class Format(StrEnum):
    """Of a file to import."""

    JSONL = "jsonl"
    PYTEST_BENCHMARK = "pytest-benchmark"
    ASV = "asv"


def export_(file: Annotated[Path, typer.Argument(help="JSON Lines to write.")], store: Store = None) -> None:
    """Write the history to a file: runs, baselines and acknowledgements."""
    from kpt_lightning.tracking.exchange import export_history

    done = export_history(existing_history(store), file)
    typer.echo(f"{_counted(done.runs, done.baselines, done.acks)} written to {file}")


def import_(
    file: Annotated[Path, typer.Argument(help="A file, or asv's results directory.")],
    store: Store = None,
    form: Annotated[Format, typer.Option("--format", help="What wrote it.")] = Format.JSONL,
) -> None:
    """Add a file to the history; runs that it knows are left alone."""
    from kpt_lightning.tracking.exchange import add_runs, import_history
    from kpt_lightning.tracking.foreign import read_asv, read_pytest_benchmark
    from kpt_lightning.tracking.store import RunStore

    into = RunStore(store)
    if form is Format.JSONL:
        done = import_history(into, file)
    else:
        done = add_runs(into, read_asv(file) if form is Format.ASV else read_pytest_benchmark(file))
    typer.echo(f"{_counted(len(done.added), done.baselines, done.acks)} added, {len(done.known)} known already")
    if done.superseded:
        typer.echo(f"{done.superseded} older baselines and acknowledgements left out: the history holds later ones")
    if done.torn:
        typer.echo(f"kpt: the last line of {file} was cut off and is left out", err=True)


def _counted(runs: int, baselines: int, acks: int) -> str:
    parts = [f"{runs} runs"]
    parts += [f"{count} {what}" for count, what in ((baselines, "baselines"), (acks, "acknowledgements")) if count]
    return ", ".join(parts)
