"""Prints every simulated constant of ``kpt_lightning/tracking/thresholds.py`` again, and the rates they give.

python benchmarks/calibrate_detector.py [--share 1.0]
"""

import argparse
import math

import numpy as np
from noisy_histories import Array, autoregressive, iid, outliers, skewed, with_step

from kpt_lightning.tracking import thresholds
from kpt_lightning.tracking.change_points import detect_changes
from kpt_lightning.tracking.gate import CUT_VARIANCE, FEWEST_TO_CUT, level_of, new_level
from kpt_lightning.tracking.noise import without_lone_values
from kpt_lightning.tracking.rank_statistic import best_split
from kpt_lightning.tracking.step_place import NEAR

BATCH = 20_000
RANK_SERIES = 300_000
GATE_SERIES = 40_000
RATE_SERIES = 4_000
NEW_RUNS = (1, 3, 5, 9)


def rank_statistics(rows: Array) -> Array:
    return best_split(without_lone_values(rows, best_split(rows)[1]))[0]


def rank_quantiles(share: float) -> None:
    print("RANK_QUANTILES = {")
    for n in thresholds.RANK_QUANTILES:
        rng = np.random.default_rng(n)
        batches = max(1, round(share * RANK_SERIES / BATCH))
        drawn = np.concatenate([rank_statistics(rng.standard_normal((BATCH, n))) for _ in range(batches)])
        found = np.quantile(drawn, [1 - level for level in thresholds.RANK_LEVELS])
        print(f"    {n}: ({', '.join(f'{value:.3f}' for value in found)}),", flush=True)
    print("}")


def gate_quantiles(share: float) -> None:
    """The noise has no memory and the limits are calibrated without the widening for it."""
    print("GATE_QUANTILES = {")
    for n in thresholds.GATE_QUANTILES:
        rng = np.random.default_rng(n)
        count = round(share * GATE_SERIES)
        level, sigma = level_of(rng.standard_normal((count, n)))
        found = []
        for k in NEW_RUNS:
            drawn = zip(rng.standard_normal((count, k)), level, sigma, strict=True)
            new = np.array([new_level(*one) for one in drawn])
            error = sigma * math.sqrt((CUT_VARIANCE if k >= FEWEST_TO_CUT else 1.0) / k + 1 / n)
            found.append(np.quantile(np.abs(new - level) / error, [0.995, 0.95]))
        decisive, usual = np.max(found, axis=0)
        print(f"    {n}: ({decisive:.2f}, {usual:.2f}),", flush=True)
    print("}")


def rates(share: float) -> None:
    """False alarms of the whole detector, which LEVEL, MEMORY_EVIDENCE and MEMORY_SLOPE were chosen by."""
    count = round(share * RATE_SERIES)
    noises = {"iid": iid, "skewed": skewed, "outliers": outliers}
    for rho in (0.3, 0.5, 0.7, 0.9):
        noises[f"AR(1) {rho}"] = lambda rng, rows, n, rho=rho: autoregressive(rng, rows, n, rho)
    for name, noise in noises.items():
        shown = []
        for n in (12, 20, 25, 30, 35, 40, 60):
            series = noise(np.random.default_rng(n), count, n)
            shown.append(f"n={n}: {sum(bool(detect_changes(values)) for values in series) / count:.2%}")
        print(f"{name}, {count} series:", *shown, flush=True)


def growing(share: float) -> None:
    """Any alarm in 40 looks, which MEMORY_SLOPE was chosen by."""
    count = round(share * RATE_SERIES)
    for name, noise in {"iid": iid, "AR(1) 0.5": autoregressive}.items():
        series = noise(np.random.default_rng(44), count, 60)
        alarms = sum(any(detect_changes(values[:n]) for n in range(21, 61)) for values in series)
        print(f"{name}, 40 looks, {count} series: {alarms / count:.2%}", flush=True)


def steps(share: float) -> None:
    """Recall and precision of one step in 30 runs, which PLACE_MASS and MEMORY_EVIDENCE were chosen by."""
    count = round(share * RATE_SERIES)
    for height in (5 / 3, 2.0, 10 / 3):
        rng = np.random.default_rng(round(100 * height))
        series, truth = with_step(rng, 100 + iid(rng, count, 30), height)
        found = [[change.index for change in detect_changes(values)] for values in series]
        pairs = zip(found, truth, strict=True)
        hits = sum(any(abs(place - int(index)) <= NEAR for place in places) for places, index in pairs)
        alarms = sum(map(len, found))
        print(f"step of {height:.2f} sigmas, {count} series: recall {hits / count:.1%}, precision {hits / alarms:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the series; less is faster and rougher")
    share = parser.parse_args().share
    rank_quantiles(share)
    gate_quantiles(share)
    rates(share)
    growing(share)
    steps(share)


if __name__ == "__main__":
    main()
