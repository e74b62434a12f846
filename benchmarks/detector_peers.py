"""The detector beside its peers on the same series: Apache Otava, asv's step detection and Perfherder's rule.

    python benchmarks/detector_peers.py [--series 1000] [--growing 200]

Prints one markdown table a group. Otava and asv are installed from PyPI, pinned, each into an environment of its own
and run as a process with JSON in and out, so that what they depend on never meets what this package depends on.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from detector_cells import Cell, real, real_runs, simulated
from detector_table import BASELINE_RUNS, NEW_RUNS
from noisy_histories import Array
from perfherder_rule import perfherder_rule

from kpt_lightning.tracking.change_points import detect_changes
from kpt_lightning.tracking.gate import Outcome, compare

PINNED = {"otava": "apache-otava==0.8.0", "asv": "asv==0.6.6"}
HERE = Path(__file__).parent
Found = list[list[int]]


class Peer:
    """A detector in an environment of its own, made at the first use."""

    def __init__(self, name: str, folder: Path) -> None:
        self.script = HERE / f"peer_{name}.py"
        self.python = folder / name / "bin" / "python"
        self.version = ""
        if not self.python.exists():
            venv.create(folder / name, with_pip=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PINNED[name]]
        subprocess.run([str(self.python), *install], check=True)

    def __call__(self, series: list[list[float]]) -> Found:
        command = [str(self.python), str(self.script)]
        answer = json.loads(
            subprocess.run(command, input=json.dumps(series), stdout=subprocess.PIPE, text=True, check=True).stdout
        )
        self.version = str(answer["version"])
        found: Found = answer["found"]
        return found


def ours(series: list[list[float]]) -> Found:
    return [[change.index for change in detect_changes(values)] for values in series]


def reference_rule(series: list[list[float]]) -> Found:
    return [perfherder_rule(values) for values in series]


def show(cells: Sequence[Cell], detectors: dict[str, Callable[[list[list[float]]], Found]]) -> None:
    group = ""
    for cell in cells:
        if cell.group != group:
            group = cell.group
            print(f"\n### {group}\n\n| series | goal | {' | '.join(detectors)} |\n{'|---' * (2 + len(detectors))}|")
        shown = [cell.score(detect(cell.series)) for detect in detectors.values()]
        print(f"| {cell.name} | {cell.goal} | {' | '.join(shown)} |", flush=True)


def gate_on_real_runs(runs: Array) -> None:
    """Each of the unchanged runs as the candidate of a pull request, beside the runs just before it."""
    print(f"\n### Gate on real medians of runs, nothing changes, {BASELINE_RUNS} runs before\n")
    print(f"| new runs | gates | {' | '.join(get_args(Outcome))} |\n|---|---|---|---|---|---|")
    for new in NEW_RUNS:
        firsts = range(BASELINE_RUNS, len(runs) - new + 1)
        verdicts = [compare(runs[at - BASELINE_RUNS : at], runs[at : at + new]).outcome for at in firsts]
        shares = [f"{verdicts.count(one) / len(verdicts):.0%}" for one in get_args(Outcome)]
        print(f"| {new} | {len(verdicts)} | {' | '.join(shares)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--growing", type=int, default=200, help="histories that are looked at 40 times")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "detector_peers")
    parser.add_argument("--real", type=Path, default=HERE / "results", help="folder with the real series")
    options = parser.parse_args()
    start = time.perf_counter()
    otava, asv = Peer("otava", options.environments), Peer("asv", options.environments)
    detectors = {"kpt": ours, "Otava": otava, "asv": asv, "Perfherder's rule": reference_rule}
    show([*simulated(options.series, options.growing), *real(options.real)], detectors)
    gate_on_real_runs(real_runs(options.real))
    print(f"\n{otava.version}, {asv.version}, Python {platform.python_version()}, numpy {np.__version__}, ", end="")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
