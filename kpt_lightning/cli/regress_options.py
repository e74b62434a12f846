"""Options that all commands of ``kpt regress`` share."""

from typing import Annotated

import typer

Store = Annotated[str | None, typer.Option("--store", help="Path or database URL; KPT_HISTORY or .kpt/runs.sqlite.")]
