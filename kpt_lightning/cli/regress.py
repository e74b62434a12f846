"""``kpt regress``: the history of runs on the command line."""

import typer

from kpt_lightning.cli.regress_baselines import accept, ack
from kpt_lightning.cli.regress_check import check
from kpt_lightning.cli.regress_doctor import doctor
from kpt_lightning.cli.regress_exchange import export_, import_
from kpt_lightning.cli.regress_report import report
from kpt_lightning.cli.regress_runs import compare, history, record

app = typer.Typer(
    help="The history of runs: is the newest one slower, since when, and where does the history come from."
)
app.command()(check)
app.command()(accept)
app.command()(ack)
app.command()(record)
app.command()(history)
app.command()(compare)
app.command()(doctor)
app.command()(report)
app.command("export")(export_)
app.command("import")(import_)
