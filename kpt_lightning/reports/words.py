"""Names, levels and shifts as a reader may see them, whatever a history holds."""

import unicodedata

from kpt_lightning.tracking.report import show_value

LONGEST = 200
"""Characters of a name or reason that are shown: more tells a reader nothing and would fill a report."""

FACTOR_FROM = 9.0
"""Relative shifts from here on are told as a factor."""

_UNSEEN = ("Cc", "Cs", "Cn", "Zl", "Zp")
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that reverse the text after them, so that a name could disguise another."""


def visible(text: str) -> str:
    """Text whose control characters, line ends and lone surrogates are written out, cut at :data:`LONGEST`.

    Nothing in a name can then end a line, colour a terminal, reverse what follows or make a file invalid.
    """
    shown = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return "".join(
        each.encode("unicode_escape").decode() if unicodedata.category(each) in _UNSEEN or each in _TURNS else each
        for each in shown
    )


def level(value: float, unit: str) -> str:
    """A number with its unit; a unit of other tools as it is."""
    known = unit in ("s", "bytes", "1") or unit.endswith("/s")
    return show_value(value, unit) if known else f"{value:.4g} {visible(unit)}"


def percent(change: float) -> str:
    """A relative change: ``+10.5%``, or ``x12`` from :data:`FACTOR_FROM` on."""
    return f"{change:+.1%}" if abs(change) < FACTOR_FROM else f"x{change + 1:.3g}"
