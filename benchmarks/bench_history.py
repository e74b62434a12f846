"""Several processes that write runs into one history at once: none may be lost, and how long it takes.

python benchmarks/bench_history.py --processes 8 --runs 1000             # SQLite in a folder of its own
python benchmarks/bench_history.py --url postgresql://user@host/empty    # an empty database
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

from kpt_lightning.tracking.record import Metric, RunKey, RunRecord
from kpt_lightning.tracking.store import RunStore

KEY = RunKey(name="m", model="a", config="b", device="cpu", device_count=1, strategy="single", precision="32-true")
METRICS = (
    "step_time", "data_wait", "tokens_per_second", "mfu", "peak_memory", "reserved_memory", "first_step_time",
    "compile_time", "checkpoint_stall", "final_loss",
)  # fmt: skip


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        place = options.url or str(Path(folder) / "runs.sqlite")
        start = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        writers = [context.Process(target=write, args=(place, n, options.runs)) for n in range(options.processes)]
        for each in writers:
            each.start()
        for each in writers:
            each.join()
        seconds, wanted = time.perf_counter() - start, options.processes * options.runs
        begin = time.perf_counter()
        stored = RunStore(place).all()
        read = time.perf_counter() - begin
        order_kept = all(in_order([run.run_id for run in stored], n) for n in range(options.processes))
        print(
            f"{len(stored)} of {wanted} runs of {options.processes} processes stored in {seconds:.1f} s, "
            f"{1e3 * seconds * options.processes / wanted:.1f} ms a run and process; "
            f"each process's order {'kept' if order_kept else 'LOST'}; all read in {read:.2f} s"
        )
        if len({run.run_id for run in stored}) != wanted or any(each.exitcode for each in writers) or not order_kept:
            raise SystemExit("runs were lost")


def write(place: str, process: int, runs: int) -> None:
    store = RunStore(place)
    metric = Metric(median=0.1, unit="s", better="lower", n=100, n_effective=50.0, mad=0.001)
    for number in range(runs):
        record = RunRecord(
            run_id=f"{process}-{number}", created_at="2026-01-01T00:00:00+00:00", key=KEY, status="finished",
            metrics=dict.fromkeys(METRICS, metric), environment={"torch": "2"},
        )  # fmt: skip
        store.add(record)


def in_order(ids: list[str], process: int) -> bool:
    mine = [int(each.partition("-")[2]) for each in ids if each.startswith(f"{process}-")]
    return mine == sorted(mine)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--url", help="a database URL; SQLite without it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
