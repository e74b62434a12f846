"""False alarms of the live drift detector over whole runs, and how soon it tells a real growth.

Steps of 0.1 s with noise of a given coefficient of variation and the autocorrelation or outliers named; data waits of
a hundredth of a step with the same noise. A growth begins in the middle of a run.

    python benchmarks/drift_table.py [--runs 400] [--steps 10000]
"""

import argparse
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from noisy_histories import Array, Noise, autoregressive, iid, outliers

from kpt_lightning.measure import statistics
from kpt_lightning.measure.timer import StepTimes
from kpt_lightning.tracking import drift, growth
from kpt_lightning.tracking.series import Work

STEP_SECONDS = 0.1
WAIT_SECONDS = 0.001
SMALLEST = 0.05
WORST_NOISE = 0.20
GROWTHS = (0.05, 0.10, 0.20)
NOISES: dict[str, Noise] = {"iid": iid, "AR(1) 0.5": autoregressive, "outliers 5 %": outliers}


@dataclass
class Constant:
    """A device whose memory and clock stay as they are."""

    def memory(self) -> float:
        return 1e9

    def clock(self) -> float:
        return 1980.0


def watched(times: Array, waits: Array) -> list[drift.Drift]:
    detector = drift.DriftDetector(Constant())
    pairs = zip(times.tolist(), waits.tolist(), strict=True)
    for number, (seconds, wait) in enumerate(pairs, start=1):
        work = Work(index=number, batches=1, samples=4, shape=(4, 8))
        detector.add(StepTimes(seconds, 0.0, wait, work))
    return detector.found


def series(noise: Noise, seed: int, runs: int, steps: int, cv: float) -> Array:
    """One run a row, relative to its level; a step takes a twentieth of it at least."""
    return np.maximum(1 + cv * noise(np.random.default_rng(seed), runs, steps), SMALLEST)


def interval(hits: int, count: int) -> str:
    """Share with Wilson's 95 % interval."""
    z = statistics.normal_quantile(0.975)
    center, spread = hits + z * z / 2, z * math.sqrt(hits * (count - hits) / count + z * z / 4)
    low, high = (center - spread) / (count + z * z), (center + spread) / (count + z * z)
    return f"{hits / count:.2%} ({low:.2%}..{high:.2%})"


def false_alarms(runs: int, steps: int, title: str, variations: Sequence[float]) -> None:
    print(f"### Runs of {steps:,} unchanged steps with any alarm, {title}, {runs} runs\n")
    print(f"| noise | {' | '.join(f'CV {cv:.0%}' for cv in variations)} |")
    print("|---" * (1 + len(variations)) + "|")
    for name, noise in NOISES.items():
        cells = []
        for place, cv in enumerate(variations):
            pairs = zip(series(noise, place, runs, steps, cv), series(noise, 100 + place, runs, steps, cv), strict=True)
            hits = sum(bool(watched(STEP_SECONDS * row, WAIT_SECONDS * wait)) for row, wait in pairs)
            cells.append(interval(hits, runs))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print()


def delays(runs: int, steps: int) -> None:
    print(f"### Step time grows in the middle of {steps:,} steps: told in time, and steps until then, {runs} runs\n")
    print("| noise | CV | growth | told | median steps | 90 % within | told before it began |")
    print("|---" * 7 + "|")
    begin = steps // 2
    for name, noise in NOISES.items():
        for cv in (0.01, 0.05):
            rows = series(noise, 7, runs, steps, cv)
            for factor in GROWTHS:
                slower = rows * np.where(np.arange(steps) >= begin, 1 + factor, 1.0)
                found = [watched(STEP_SECONDS * row, np.full(steps, WAIT_SECONDS)) for row in slower]
                told = [each[0].noticed_step for each in found if each]
                waits = [step - begin for step in told if step > begin]
                middle, late = (statistics.quantile(waits, share) for share in (0.5, 0.9))
                shown = ["-" if value is None else f"{value:,.0f}" for value in (middle, late)]
                early = interval(len(told) - len(waits), runs)
                told_share = interval(len(waits), runs)
                print(
                    f"| {name} | {cv:.0%} | +{factor:.0%} | {told_share} | {shown[0]} | {shown[1]} | {early} |",
                    flush=True,
                )
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}\n")
    false_alarms(arguments.runs, arguments.steps, "as shipped", (0.01, 0.05, WORST_NOISE))
    least, growth.LEAST_GROWTH = growth.LEAST_GROWTH, 1e-6
    false_alarms(arguments.runs, arguments.steps, f"by chance alone, without the least growth of {least:.0%}", (0.05,))
    growth.LEAST_GROWTH = least
    delays(max(arguments.runs // 4, 1), arguments.steps)


if __name__ == "__main__":
    main()
