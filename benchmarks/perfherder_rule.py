"""Mozilla Perfherder's alert rule, written anew from its description: a reference, not Mozilla's code.

A push is suspected when Student's t between the 12 values before it and the 12 from it on is above 7 and the means
differ by 2 % or more; of suspected pushes closer than 12 the one with the largest t is reported. Perfherder weights
values by their distance from the push and compares each value with up to 24 before it; this rule weights 12 a side
alike. Both directions count here.
"""

from collections.abc import Sequence

import numpy as np

SIDE = 12
LEAST_T = 7.0
LEAST_SHIFT = 0.02


def perfherder_rule(values: Sequence[float]) -> list[int]:
    """Indices of the first value of each new level; empty below 24 values."""
    series = np.asarray(values, dtype=np.float64)
    places = range(SIDE, len(series) - SIDE + 1)
    suspected: dict[int, float] = {}
    for place in places:
        before, after = series[place - SIDE : place], series[place : place + SIDE]
        shift = after.mean() - before.mean()
        error = np.sqrt((before.var(ddof=1) + after.var(ddof=1)) / SIDE)
        t = abs(shift) / error if error > 0.0 else (np.inf if shift else 0.0)
        if t > LEAST_T and abs(shift) >= LEAST_SHIFT * abs(before.mean()):
            suspected[place] = float(t)
    found: list[int] = []
    for place, _ in sorted(suspected.items(), key=lambda pair: -pair[1]):
        if all(abs(place - other) >= SIDE for other in found):
            found.append(place)
    return sorted(found)
