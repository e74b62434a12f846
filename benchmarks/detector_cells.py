"""The series that every detector is given, and what is counted: one cell for each row of the table beside the peers.

Simulated cells draw the very series of ``detector_table.py``; real ones come from ``real_histories.py``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from detector_table import FIRST_LOOK, LAST_LOOK, NEAR, SHIFTS, SIZES, draw, generator
from noisy_histories import NOISES, Array, with_step

RUNS = 30
REAL_STRIDE = 3
REAL_SHIFTS = (0.02, 0.05, 0.10, 0.20)
ALARM_GOALS = {"iid": "1%", "AR(1) 0.5": "5%"}
OTHER_ALARM_GOAL = "2%"
LOOK_GOALS = {"AR(1) 0.5": "10%"}
OTHER_LOOK_GOAL = "5%"
RECALL_GOALS = {
    ("iid", 0.01, 0.02): 80, ("iid", 0.01, 0.05): 99, ("iid", 0.01, 0.10): 99, ("iid", 0.01, 0.20): 99,
    ("iid", 0.03, 0.05): 58, ("iid", 0.03, 0.10): 98, ("iid", 0.10, 0.20): 70, ("outliers 5 %", 0.03, 0.05): 38,
    ("outliers 5 %", 0.03, 0.10): 90, ("outliers 5 %", 0.03, 0.20): 98,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One row of a table.

    Attributes:
        group: Title of the table.
        name: What is special about the row.
        series: The histories; consecutive ``looks`` of them are one history that grows.
        goal: Of the project.
        truth: Index of the step of each series; empty where nothing changes.
        looks: Looks at each history.
    """

    group: str
    name: str
    series: list[list[float]]
    goal: str = "-"
    truth: list[int] = field(default_factory=list)
    looks: int = 1

    def score(self, found: Sequence[Sequence[int]]) -> str:
        """Share of histories with any alarm, or recall and precision where there is a step to find."""
        if not self.truth:
            grouped = [found[at : at + self.looks] for at in range(0, len(found), self.looks)]
            return f"{np.mean([any(map(len, each)) for each in grouped]):.1%}"
        hits = [
            any(abs(place - index) <= NEAR for place in places)
            for places, index in zip(found, self.truth, strict=True)
        ]  # fmt: skip
        alarms = sum(map(len, found))
        return f"{np.mean(hits):.0%} ({sum(hits) / alarms:.1%})" if alarms else "0% (-)"


def simulated(count: int, looked_at: int) -> Iterator[Cell]:
    group = f"Nothing changes: series flagged, CV 3 %, {count} series"
    for noise in NOISES:
        for n in SIZES:
            goal = f"at most {ALARM_GOALS.get(noise, OTHER_ALARM_GOAL)}"
            yield Cell(group, f"{noise}, n = {n}", draw(noise, 0.03, count, n).tolist(), goal)
    looks = range(FIRST_LOOK + 1, LAST_LOOK + 1)
    group = f"Nothing changes: any alarm in {len(looks)} looks at a growing history, {looked_at} series"
    for noise in NOISES:
        grown = [values[:n].tolist() for values in draw(noise, 0.03, looked_at, LAST_LOOK) for n in looks]
        yield Cell(group, noise, grown, f"at most {LOOK_GOALS.get(noise, OTHER_LOOK_GOAL)}", looks=len(looks))
    group = f"One step in the middle 40 % of {RUNS} runs: recall (precision), hit within {NEAR}, {count} series"
    for noise in NOISES:
        for variation, shifts in SHIFTS.items():
            for shift in shifts:
                unchanged = draw(noise, variation, count, RUNS)
                series, truth = with_step(generator(noise, shift, RUNS), unchanged, shift)
                goal = RECALL_GOALS.get((noise, variation, shift))
                shown = f"{noise}, CV {variation:.0%}, step {shift:.0%}"
                yield Cell(group, shown, series.tolist(), f"{goal}% (98%)" if goal else "-", truth.tolist())


def real_runs(folder: Path) -> Array:
    """Medians of real runs of unchanged work, oldest first."""
    return np.loadtxt(_newest(folder, "real_runs"), delimiter=",", skiprows=2, usecols=2)


def real(folder: Path) -> Iterator[Cell]:
    """Step times cut into histories of 30 consecutive steps; run medians into overlapping ones, every third run."""
    steps = np.loadtxt(_newest(folder, "real_steps"), delimiter=",", skiprows=2).T
    runs = real_runs(folder)
    blocks = steps[:, : steps.shape[1] // RUNS * RUNS].reshape(-1, RUNS)
    windows = np.lib.stride_tricks.sliding_window_view(runs, RUNS)[::REAL_STRIDE]
    grown = [runs[:n].tolist() for n in range(FIRST_LOOK + 1, len(runs) + 1)]
    for name, series in (("consecutive steps", blocks), ("medians of runs", windows)):
        kind = f"Real {name} of unchanged work, {len(series)} histories of {RUNS}"
        yield Cell(f"{kind}: flagged", name, series.tolist(), "at most 5%")
        for shift in REAL_SHIFTS:
            rng = generator("real", name, shift)
            mask, truth = with_step(rng, np.zeros(series.shape), shift)
            shifted: Array = series * (1 + mask)
            group = f"{kind}, with an injected step: recall (precision)"
            yield Cell(group, f"{name}, step {shift:.0%}", shifted.tolist(), "-", truth.tolist())
    group = f"Real medians of runs: any alarm while the history grows from {FIRST_LOOK} to {len(runs)}, 1 history"
    yield Cell(group, "medians of runs", grown, "none", looks=len(grown))


def _newest(folder: Path, name: str) -> Path:
    found = sorted(folder.glob(f"{name}_*.csv"))
    if not found:
        raise SystemExit(f"no {name}_*.csv in {folder}: run benchmarks/real_histories.py first")
    return found[-1]
