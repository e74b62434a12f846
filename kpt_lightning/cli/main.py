"""The ``kpt`` command. Each subcommand is one file that imports what is heavy only when it runs."""

from typing import Annotated

import typer

from kpt_lightning import __version__
from kpt_lightning.cli.accelerate_config import accelerate_config
from kpt_lightning.cli.config import config
from kpt_lightning.cli.doctor import doctor
from kpt_lightning.cli.finetune import finetune
from kpt_lightning.cli.optimize import optimize
from kpt_lightning.cli.regress import app as regress
from kpt_lightning.errors import HistoryError, KptError

UNREADABLE = 4
"""Exit status of a history that cannot be read, apart from wrong usage."""

app = typer.Typer(
    name="kpt",
    help="Hardware optimizations for PyTorch training: see what fits this machine, measure it, prove that it ran.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(accelerate_config)
app.command()(config)
app.command()(doctor)
app.command()(finetune)
app.command()(optimize)
app.add_typer(regress, name="regress")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kpt-lightning {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the subcommand."""


def main() -> None:
    """Run ``kpt``; an error of ours is one line on stderr and exit status 2, or 4 where a history cannot be read."""
    try:
        app()
    except KptError as error:
        typer.echo(f"kpt: {' '.join(str(error).split())}", err=True)
        raise SystemExit(UNREADABLE if isinstance(error, HistoryError) else 2) from None


if __name__ == "__main__":
    main()
