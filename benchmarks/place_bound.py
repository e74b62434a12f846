"""How well can the place of a step be known at all? What no detector can beat on the steps of ``detector_table.py``.

python benchmarks/place_bound.py [--series 40000]

Normal noise, 30 runs, one step in the middle 40 %, right within two. The series whose place is surest are reported
first; shown is the recall up to which 98 % of the places are right, and the precision at the recall that is the goal.
Two readers are told that there is a step: one knows nothing else, the other both levels, the noise and the middle 40 %.
"""

import argparse
from collections.abc import Callable

import numpy as np
from detector_table import NEAR, generator
from noisy_histories import Array, iid, with_step

RUNS = 30
LEAST_SIDE = 3
PRECISION = 0.98
STEPS = {5 / 3: 0.58, 2.0: 0.80}
"""Height of the step in standard deviations of the noise, to the recall that is the goal."""


def knows_nothing(rows: Array, height: float) -> Array:
    """Log posterior of each place: flat priors on levels and log scale, on places one proportional to ``k (n - k)``."""
    n = rows.shape[1]
    places = np.arange(LEAST_SIDE, n - LEAST_SIDE + 1)
    centred = rows - rows.mean(axis=1, keepdims=True)
    balance = places * (n - places) / n
    explained = np.cumsum(centred, axis=1)[:, places - 1] ** 2 / balance
    total = (centred**2).sum(1, keepdims=True)
    logs = np.full(rows.shape, -np.inf)
    logs[:, places] = -(n - 2) / 2 * np.log((total - explained) / total) + 0.5 * np.log(balance)
    return logs


def knows_all(rows: Array, height: float) -> Array:
    n = rows.shape[1]
    places = np.arange(int(np.ceil(0.3 * n)), int(0.7 * n) + 1)
    ratio = height * rows - height**2 / 2
    logs = np.full(rows.shape, -np.inf)
    logs[:, places] = np.cumsum(ratio[:, ::-1], axis=1)[:, ::-1][:, places]
    return logs


def surest(logs: Array) -> tuple[Array, Array]:
    """The place with most posterior within two, and that posterior."""
    posterior = np.exp(logs - logs.max(axis=1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(posterior, ((0, 0), (NEAR, NEAR))), 2 * NEAR + 1, axis=1)
    mass = windows.sum(axis=2)
    return mass.argmax(axis=1), mass.max(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=40_000)
    count = parser.parse_args().series
    readers: dict[str, Callable[[Array, float], Array]] = {"nothing else": knows_nothing, "all": knows_all}
    print("| step, sigmas | reader knows | all places told: right | recall at 98 % right | right at the recall goal |")
    print("|---" * 5 + "|")
    for height, goal in STEPS.items():
        rng = generator("place", height)
        rows, truth = with_step(rng, iid(rng, count, RUNS), height)
        for name, reader in readers.items():
            place, mass = surest(reader(rows, height))
            right = (np.abs(place - truth) <= NEAR)[np.argsort(-mass)]
            precision, recall = np.cumsum(right) / np.arange(1, count + 1), np.cumsum(right) / count
            enough = np.flatnonzero(precision >= PRECISION)
            best = recall[enough[-1]] if len(enough) else 0.0
            at_goal = precision[np.searchsorted(recall, goal)]
            print(f"| {height:.2f} | {name} | {right.mean():.1%} | {best:.0%} | {at_goal:.1%} at {goal:.0%} |")


if __name__ == "__main__":
    main()
