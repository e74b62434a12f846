"""What a check found as markdown: a comment on a pull request, or the summary of a step.

Dialect: https://github.github.com/gfm/, which GitLab renders as well.
"""

import re
from collections.abc import Iterable, Sequence

from kpt_lightning.reports.findings import Finding, summary
from kpt_lightning.reports.folding import Fold, folded

MOST_CHARACTERS = 65_000
"""GitHub refuses a comment of more than 65,536; a script may add a line of its own."""

TABLE_SHARE = 0.5
"""Of the characters, so that the details have room."""

MARKER = "<!-- kpt-regress -->"
"""First line, by which a script finds the comment to replace."""

_SPECIAL = re.compile(r"[\\`*_\[\]#!|~$]")
_BLOCK = re.compile(r"^(\d*)(?=[-+=.)](?:[\s=-]|$))")
"""The start of a list, a rule or an underline, with the number of a numbered list."""

_RESERVED = 200


def to_markdown(found: Sequence[Finding], *, fold: bool = True) -> str:
    """One headline, a table, and the details folded; never longer than :data:`MOST_CHARACTERS`.

    What matters most comes first, so that what does not fit matters least; its number is told.

    Args:
        found: Of :func:`.findings.describe`.
        fold: Whether metrics of one key that need no look share a row; the details hold each.
    """
    text = f"{MARKER}\n### {prose(summary(found))}\n"
    if not found:
        return text
    text += "\n| run | metric | before | now | change | 95% interval | verdict |\n"
    text += f"|{' --- |' * 7}\n"
    shown, folds = folded(found, fold=fold)
    rows = [*map(_row, shown), *map(_folded_row, folds)]
    text += _fitting(rows, int(MOST_CHARACTERS * TABLE_SHARE) - len(text), "rows")
    text += "\n<details><summary>Why, since when, and what was compared</summary>\n\n"
    end = "\n</details>\n"
    return text + _fitting(map(_details, found), MOST_CHARACTERS - len(text) - len(end), "metrics") + end


def prose(text: str) -> str:
    """Text that markdown shows as it is: no mark-up, no HTML, and nobody is notified by an ``@name``."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _SPECIAL.sub(r"\\\g<0>", text.strip())
    return _BLOCK.sub(r"\1\\", text).replace("@", "@\u200b")


def _row(finding: Finding) -> str:
    worth_a_look = finding.state not in ("passed", "unsettled")
    verdict = f"**{prose(finding.verdict)}**" if worth_a_look else prose(finding.verdict)
    cells = map(prose, (finding.name, finding.metric, finding.before, finding.now, finding.change, finding.interval))
    return f"| {' | '.join(cells)} | {verdict} |\n"


def _folded_row(fold: Fold) -> str:
    metrics = f"{len(fold.metrics)} metrics: {', '.join(fold.metrics)}"
    return f"| {prose(fold.name)} | {prose(metrics)} | | | | | {prose(fold.verdict)} |\n"


def _details(finding: Finding) -> str:
    first, *rest = map(prose, finding.lines)
    return f"- **{prose(finding.title)}**: {first}\n" + "".join(f"  - {line}\n" for line in rest)


def _fitting(parts: Iterable[str], room: int, what: str) -> str:
    """As many parts as fit, and the number of those that do not."""
    every = list(parts)
    kept, used = 0, 0
    while kept < len(every) and used + len(every[kept]) <= room - _RESERVED:
        used += len(every[kept])
        kept += 1
    left = len(every) - kept
    more = f"\n{left} more {what} in the output of `kpt regress check --format json`.\n" if left else ""
    return "".join(every[:kept]) + more
