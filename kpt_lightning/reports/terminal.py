"""What a check found as a terminal shows it: key by key, the worst first, what is common said once."""

import io
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kpt_lightning.reports.findings import SHORT_ID, Finding, State
from kpt_lightning.reports.folding import KeyFindings, by_key

TITLE = "Newest runs against those before"
COLUMNS = ("metric", "before", "now", "change", "95% interval", "verdict")
NUMBERS = ("before", "now", "change", "95% interval")

PLAIN_WIDTH = 160
"""Columns of a build's log or a file: rich would take 80, which breaks cells."""

INDENT, GAP = 2, 2

NARROWEST = dict.fromkeys(COLUMNS, 11) | {"95% interval": 17}
"""Columns of a cell before it breaks: a throughput of millions and any interval fit, and all six cells into 80."""

STYLES: dict[State, str] = {
    "failing": "bold red", "tolerated": "yellow", "acknowledged": "yellow", "improved": "green",
}  # fmt: skip
"""Of the verdict; colour is never the only sign."""


def to_terminal(found: Sequence[Finding], width: int, *, fold: bool = True) -> RenderableType:
    """All findings.

    Args:
        found: Of :func:`.findings.describe`.
        width: Columns of the console.
        fold: Whether metrics of one key that need no look share a line.
    """
    keys = by_key(found, fold=fold)
    widths = _widths([each for key in keys for each in key.shown], width)
    return Group(Text(TITLE, style="italic"), *(line for key in keys for line in _key(key, widths)))


def to_text(found: Sequence[Finding], *, fold: bool = True) -> str:
    """The same without colours, as wide as a log."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(to_terminal(found, PLAIN_WIDTH, fold=fold))
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _key(key: KeyFindings, widths: Sequence[int]) -> Iterator[RenderableType]:
    yield Text()
    yield Text.assemble((key.title, "bold"), (f"  key {key.digest[:SHORT_ID]}", "dim"))
    if key.shown:
        yield _indented(_table(key.shown, widths))
    for fold in key.folds:
        yield _indented(Text(fold.text))
    for note in key.notes:
        yield _indented(Text(note, style="dim"))


def _table(shown: Sequence[Finding], widths: Sequence[int]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for name, width in zip(COLUMNS, widths, strict=True):
        table.add_column(name, justify="right" if name in NUMBERS else "left", min_width=width, overflow="fold")
    for each in shown:
        *cells, verdict = _cells(each)
        table.add_row(*map(Text, cells), Text(verdict, style=STYLES.get(each.state, "")))
    return table


def _cells(finding: Finding) -> tuple[str, ...]:
    metric = f"- {finding.metric}" if finding.leading else finding.metric
    return metric, finding.before, finding.now, finding.change, finding.interval, finding.verdict


def _widths(shown: Sequence[Finding], width: int) -> list[int]:
    """Of the columns, so that the tables of all keys stand in line where there is room."""
    cells = [COLUMNS, *map(_cells, shown)]
    natural = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    if INDENT + sum(natural) + GAP * len(natural) <= width:
        return natural
    return [min(each, NARROWEST[name]) for name, each in zip(COLUMNS, natural, strict=True)]


def _indented(line: RenderableType) -> Padding:
    return Padding(line, (0, 0, 0, INDENT), expand=False)
