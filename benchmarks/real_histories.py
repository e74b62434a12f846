"""Real step times of a tiny training loop, and real medians of unchanged runs, as CSV files for the detector's table.

    python benchmarks/real_histories.py --out benchmarks/results [--runs 120] [--steps 3000]

Nothing about the work changes between the runs, so whatever a detector reports on these series is the machine's doing.
Times are taken on the CPU with one thread, where other work may be running: that is the point.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

WARMUP_STEPS = 50
STEPS_OF_A_RUN = 400
LONG_RUNS = 4
WIDTH, BATCH = 256, 128
TO_MICROSECONDS = 1e6
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def train(steps: int) -> list[float]:
    """Seconds of each step of a small network on fixed random data, without the warm-up."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs, targets = torch.randn(BATCH, WIDTH), torch.randn(BATCH, 1)
    seconds = []
    for _ in range(WARMUP_STEPS + steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP_STEPS:]


def in_new_process(steps: int) -> list[float]:
    """The same in a process of its own, as runs are."""
    command = [sys.executable, __file__, "--child", str(steps)]
    printed = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD, timeout=600
    ).stdout
    return [float(each) for each in printed.split()]


def write(path: Path, command: str, head: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        file.write(f"# {datetime.now(UTC):%Y-%m-%d}, python {command}, Python {platform.python_version()}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)
    print(path, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--runs", type=int, default=120)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(*train(options.child), sep="\n")
        return
    command = f"benchmarks/real_histories.py --runs {options.runs} --steps {options.steps}"
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    long = [in_new_process(options.steps) for _ in range(LONG_RUNS)]
    steps = [[round(TO_MICROSECONDS * value, 1) for value in row] for row in zip(*long, strict=True)]
    write(options.out / f"real_steps_{day}.csv", command, [f"run_{at}_us" for at in range(LONG_RUNS)], steps)
    medians: list[list[object]] = []
    for run in range(options.runs):
        median = statistics.median(in_new_process(STEPS_OF_A_RUN))
        medians.append([run, f"{datetime.now(UTC):%H:%M:%S}", round(TO_MICROSECONDS * median, 2)])
    write(options.out / f"real_runs_{day}.csv", command, ["run", "time_utc", "median_us"], medians)


if __name__ == "__main__":
    main()
