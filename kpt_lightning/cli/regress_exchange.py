"""``kpt regress export`` and ``import``: the history as a file, and files of other tools."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kpt_lightning.cli.regress_options import Store


class Format(StrEnum):
    """Of a file to import."""

    JSONL = "jsonl"
    PYTEST_BENCHMARK = "pytest-benchmark"
    ASV = "asv"


def export_(file: Annotated[Path, typer.Argument(help="JSON Lines to write.")], store: Store = None) -> None:
    """Write every run of the history to a file."""
    from kpt_lightning.tracking.exchange import export_runs
    from kpt_lightning.tracking.store import RunStore

    count = export_runs(RunStore(store), file)
    typer.echo(f"{count} runs written to {file}")


def import_(
    file: Annotated[Path, typer.Argument(help="A file, or asv's results directory.")],
    store: Store = None,
    form: Annotated[Format, typer.Option("--format", help="What wrote it.")] = Format.JSONL,
) -> None:
    """Add runs to the history; those that it knows are left alone."""
    from kpt_lightning.tracking.exchange import add_runs, import_runs
    from kpt_lightning.tracking.foreign import read_asv, read_pytest_benchmark
    from kpt_lightning.tracking.store import RunStore

    into = RunStore(store)
    if form is Format.JSONL:
        done = import_runs(into, file)
    else:
        done = add_runs(into, read_asv(file) if form is Format.ASV else read_pytest_benchmark(file))
    typer.echo(f"{len(done.added)} runs added, {len(done.known)} known already")
    if done.torn:
        typer.echo(f"kpt: the last line of {file} was cut off and is left out", err=True)
