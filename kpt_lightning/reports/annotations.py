"""What a check found as annotations of GitHub Actions.

Form and escapes: https://docs.github.com/en/actions/reference/workflow-commands-for-github-actions and the toolkit of
the same owner, packages/core/src/command.ts.
"""

from collections.abc import Sequence

from kpt_lightning.reports.findings import Finding

LEVELS = {"failing": "error", "tolerated": "warning", "acknowledged": "notice", "unsettled": "notice",
          "improved": "notice"}  # fmt: skip
"""Level of each state; what passed is not annotated."""

MOST = 10
"""GitHub shows so many annotations of each level and step, and drops the rest without a word."""


def to_annotations(found: Sequence[Finding]) -> str:
    """One workflow command a line, for metrics that fell together one; empty where everything passed.

    The last one of a full level counts the rest.
    """
    lines = []
    for level in ("error", "warning", "notice"):
        mine = [each for each in found if LEVELS.get(each.state) == level and not each.leading]
        shown = mine if len(mine) <= MOST else mine[: MOST - 1]
        lines += [_command(level, f"{each.name}: {each.verdict}", "\n".join(each.lines)) for each in shown]
        if len(shown) < len(mine):
            rest = f"{len(mine) - len(shown)} more; kpt regress check prints all of them."
            lines.append(_command(level, "kpt regress check", rest))
    return "".join(f"{line}\n" for line in lines)


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={_escaped(title).replace(':', '%3A').replace(',', '%2C')}::{_escaped(message)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
