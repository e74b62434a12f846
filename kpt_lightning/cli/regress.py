"""``kpt regress``: the history of runs on the command line."""

import typer

from kpt_lightning.cli.regress_check import check
from kpt_lightning.cli.regress_exchange import export_, import_

app = typer.Typer(
    help="The history of runs: is the newest one slower, since when, and where does the history come from."
)
app.command()(check)
app.command("export")(export_)
app.command("import")(import_)
