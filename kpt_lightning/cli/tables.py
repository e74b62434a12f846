"""Tables for a terminal; rich is imported when one is made."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def new_table(title: str, *columns: str) -> "Table":
    """A table that wraps long cells and never cuts them."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def plain(text: str) -> str:
    """Text whose square brackets, as in a pip line, are not read as markup."""
    from rich.markup import escape

    return escape(text)
