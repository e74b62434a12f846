"""A row of bars for a terminal."""

from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
    """One bar a value, the smallest lowest; all in the middle where they are equal."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    # Halves, because the difference of huge values may not be finite.
    span = high / 2 - low / 2
    if span == 0.0:
        return BARS[len(BARS) // 2] * len(values)
    return "".join(BARS[min(int((value / 2 - low / 2) / span * len(BARS)), len(BARS) - 1)] for value in values)
