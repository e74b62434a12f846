"""How often does the detector cry wolf, and what does it find? Prints the accuracy table as markdown.

python benchmarks/detector_table.py [--series 1000]

Every cell draws its own series from a fixed seed, so that the table comes out the same again. Intervals are Wilson's
(https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval), 95 %. ``detector_peers.py`` gives the same
series to Otava, asv and Perfherder's rule.
"""

import argparse
import math
import time
import zlib
from collections.abc import Sequence

import numpy as np
from noisy_histories import BEYOND_THE_GOALS, NOISES, Array, Noise, with_step

from kpt_lightning.tracking.change_points import detect_changes
from kpt_lightning.tracking.gate import compare

NEAR = 2
SIZES = (20, 30, 50)
FIRST_LOOK, LAST_LOOK = 20, 60
SHIFTS = {0.01: (0.02, 0.05, 0.10, 0.20), 0.03: (0.02, 0.05, 0.10, 0.20), 0.10: (0.05, 0.10, 0.20)}
GATES = ((0.01, 0.02), (0.01, 0.05), (0.03, 0.05), (0.03, 0.10), (0.03, 0.20))
NEW_RUNS = (1, 2, 3, 5)
BASELINE_RUNS = 30


def ours(values: Array) -> Sequence[int]:
    return [change.index for change in detect_changes(values)]


def generator(*cell: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(cell).encode()))


def draw(noise: str, variation: float, count: int, n: int) -> Array:
    made: Noise = {**NOISES, **BEYOND_THE_GOALS}[noise]
    return 1 + variation * made(generator(noise, variation, n), count, n)


def wilson(hits: int, count: int) -> str:
    """Share in percent with its 95 % interval."""
    if not count:
        return "-"
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return f"{share:.1%} ({max(middle - half, 0.0):.1%}..{min(middle + half, 1.0):.1%})"


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n### {title}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|", sep="\n")
    print(*("| " + " | ".join(row) + " |" for row in rows), sep="\n", flush=True)


def false_alarms(count: int) -> None:
    rows = []
    for noise in (*NOISES, *BEYOND_THE_GOALS):
        alarms = [sum(bool(ours(values)) for values in draw(noise, 0.03, count, n)) for n in SIZES]
        rows.append([noise, *(wilson(alarm, count) for alarm in alarms)])
    show(f"unchanged series flagged, {count} series", ["noise", *(f"n = {n}" for n in SIZES)], rows)


def repeated_looks(count: int) -> None:
    rows = []
    for noise in NOISES:
        series = draw(noise, 0.03, count, LAST_LOOK)
        looks = range(FIRST_LOOK + 1, LAST_LOOK + 1)
        rows.append([noise, wilson(sum(any(ours(values[:n]) for n in looks) for values in series), count)])
    title = f"any alarm in 40 looks at a history that grows from {FIRST_LOOK} to {LAST_LOOK}, {count} series"
    show(title, ["noise", "any alarm"], rows)


def recall_and_precision(count: int, n: int = 30) -> None:
    rows = []
    for noise in NOISES:
        for variation, shifts in SHIFTS.items():
            for shift in shifts:
                series, truth = with_step(generator(noise, shift, n), draw(noise, variation, count, n), shift)
                hits = alarms = 0
                for values, index in zip(series, truth, strict=True):
                    found = ours(values)
                    alarms += len(found)
                    hits += any(abs(place - int(index)) <= NEAR for place in found)
                cell = [noise, f"{variation:.0%}", f"{shift:.0%}", wilson(hits, count), wilson(hits, alarms)]
                rows.append(cell)
    head = ["noise", "CV", "shift", "recall", "precision"]
    show(f"one step in the middle 40 % of {n} runs, hit within {NEAR}, {count} series", head, rows)


def gate_false_alarms(count: int) -> None:
    rows = []
    for noise in NOISES:
        cells = []
        for k in NEW_RUNS:
            series = draw(noise, 0.03, count, BASELINE_RUNS + k)
            outcomes = [compare(values[:BASELINE_RUNS], values[BASELINE_RUNS:]).outcome for values in series]
            cells.append(wilson(sum(one in ("regression", "improvement") for one in outcomes), count))
        rows.append([noise, *cells])
    head = ["noise", *(f"{k} new" for k in NEW_RUNS)]
    show(f"gate: unchanged, {BASELINE_RUNS} runs before, regression or improvement, {count} series", head, rows)


def gate_power(count: int) -> None:
    rows = []
    for noise in NOISES:
        for variation, shift in GATES:
            cells = []
            for k in NEW_RUNS:
                series = draw(noise, variation, count, BASELINE_RUNS + k)
                series[:, BASELINE_RUNS:] += shift
                verdicts = [compare(values[:BASELINE_RUNS], values[BASELINE_RUNS:]) for values in series]
                found = sum(verdict.outcome == "regression" for verdict in verdicts)
                named = sum(verdict.outcome == "regression" and verdict.severity is not None for verdict in verdicts)
                cells.append(f"{wilson(found, count)}; minor or worse {named / count:.0%}")
            rows.append([noise, f"{variation:.0%}", f"{shift:.0%}", *cells])
    head = ["noise", "CV", "shift", *(f"{k} new" for k in NEW_RUNS)]
    show(f"gate: regression found, {BASELINE_RUNS} runs before, {count} series", head, rows)


def cost() -> None:
    series = draw("iid", 0.03, 10, 10_000)
    start = time.perf_counter()
    for values in series:
        detect_changes(values)
    print(f"\n10,000 runs x 10 metrics: {time.perf_counter() - start:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=1000)
    count = parser.parse_args().series
    false_alarms(count)
    repeated_looks(count)
    recall_and_precision(count)
    gate_false_alarms(count)
    gate_power(count)
    cost()


if __name__ == "__main__":
    main()
