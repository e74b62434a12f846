"""Numbers for a person: one unit and one number of digits for all values of a metric."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from kpt_lightning.reports.elements import isolated

SPACE = "\u00a0"
"""Keeps a number and its unit on one line."""

MINUS, TIMES = "\u2212", "\u00d7"

UNITS = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")),
    "bytes": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
}
"""Size and name of each unit, the largest first; memory in powers of two, as torch and the terminal's tables."""

DIGITS = 4
"""Significant digits of a value: a change of 0.1 % is seen."""

PLAIN = (1e-6, 1e12)
"""Outside of these a number is written with its power of ten."""

LONGEST_UNIT = 12
"""Characters of a unit of a user's own."""

LONGEST_TIME = 32

COMMIT = 10
"""Digits of a commit that are shown."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How the values of one metric are written.

    Attributes:
        size: Of the unit shown, in the unit stored.
        unit: Its name, empty for a pure number.
        digits: After the point.
    """

    size: float
    unit: str
    digits: int

    @classmethod
    def of(cls, values: Iterable[float], unit: str, metric: str = "") -> "Scale":
        """The scale that suits the largest value."""
        largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
        size, shown = 1.0, "" if unit == "1" else unit[:LONGEST_UNIT]
        if unit in UNITS:
            size, shown = next(
                (each for each in UNITS[unit] if largest >= each[0]), UNITS[unit][0 if not largest else -1]
            )
        elif metric == "mfu":
            size, shown = 0.01, "%"
        return cls(size, shown, _digits(largest / size))

    def number(self, value: float) -> str:
        """Without the unit."""
        scaled = value / self.size
        if not math.isfinite(scaled):
            return "not a number" if math.isnan(scaled) else f"{scaled}".replace("-", MINUS)
        plain = scaled == 0 or PLAIN[0] <= abs(scaled) < PLAIN[1]
        text = f"{scaled:,.{self.digits}f}" if plain else f"{scaled:.{DIGITS}g}"
        return text.replace("-", MINUS)

    def show(self, value: float) -> str:
        """With the unit."""
        return self.number(value) + (f"{SPACE}{self.unit}" if self.unit else "")

    def ticks(self, low: float, high: float, most: int = 5) -> tuple[list[float], "Scale"]:
        """Round values inside a range, at most so many, and the scale that tells them apart."""
        first, last = low / self.size, high / self.size
        if not 0.0 < last - first < math.inf:
            return [], self
        step = _round_step((last - first) / max(most - 1, 1))
        count = math.floor(last / step) - math.ceil(first / step) + 1
        values = [(math.ceil(first / step) + number) * step * self.size for number in range(count)]
        return values, Scale(self.size, self.unit, min(max(0, -math.floor(math.log10(step))), 9))


def percent(change: float) -> str:
    """A relative change with its sign, one digit after the point; a factor from ten times on."""
    if not math.isfinite(change):
        return "unknown"
    if abs(change) < 0.0005:
        return f"0.0{SPACE}%"
    text = f"{change * 100:+.1f}{SPACE}%" if abs(change) < 9.0 else f"{TIMES}{change + 1:.3g}"
    return text.replace("-", MINUS)


def percent_range(low: float, high: float) -> str:
    """An interval of a relative change."""
    return f"{percent(low)} to {percent(high)}"


def moment(text: str) -> str:
    """A time of a record to the minute, in UTC; what is no time is shown as it is."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return isolated(text[:LONGEST_TIME])
    return f"{(time if time.tzinfo is None else time.astimezone(UTC)):%Y-%m-%d %H:%M} UTC"


def counted(count: int, one: str, several: str = "") -> str:
    """A number and its noun."""
    return f"{count:,}{SPACE}{one if count == 1 else several or one + 's'}"


def _digits(value: float) -> int:
    if not PLAIN[0] <= value < PLAIN[1]:
        return 1
    return min(max(0, DIGITS - 1 - math.floor(math.log10(value))), 9)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(part * power for part in (1.0, 2.0, 5.0, 10.0) if part * power >= least * (1 - 1e-9))
