"""Speed of our own kernels against the copy rate of the same GPU and against torch.compile, numbers checked first.

    python benchmarks/bench_kernels.py --out results/                 # every kernel, every launch configuration
    python benchmarks/bench_kernels.py --only gated --sizes 1b        # no files

Bytes are what a kernel must move: each read, as often as its method needs it, and each write. L2 is flushed before each
run. A new kernel is a function in kernel_cases.py that yields a ``Case`` per size, registered in ``KERNELS``.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_cases import KERNELS, SIZES, Case
from results_table import Run, environment, markdown, versions, write_dated

WARM_UPS, RUNS = 10, 50
FLUSH_BYTES = 256 << 20
HEAD_START_CYCLES = 100_000_000
"""About 50 ms in which the GPU waits, so that no launch is timed that the host was late for."""

COLUMNS = (
    "kernel", "size", "launch", "SQNR, dB", "ms: median", "10 to 90 %", "MB", "TB/s", "of the copy rate",
    "each kernel, us",
)  # fmt: skip


def timed(call: Callable[[], Any]) -> list[float]:
    """Milliseconds of each run, sorted, on the GPU's clock with a flushed L2."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(WARM_UPS):
        call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    torch.cuda._sleep(HEAD_START_CYCLES)
    for start, end in marks:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in marks)


def each_kernel(call: Callable[[], Any], runs: int = 5) -> dict[str, float]:
    """Microseconds of each kernel of a call, by torch's profiler."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(runs):
            flush.zero_()
            call()
        torch.cuda.synchronize()
    found = {event.key: event.device_time_total / runs for event in profile.key_averages()}
    return {name: time for name, time in found.items() if "elementwise" not in name.lower() and time >= 1}


def copy_rate() -> float:
    """Bytes per second, read and written, of a clone of 1 GB."""
    x = torch.zeros(1 << 29, dtype=torch.bfloat16, device="cuda")
    return 2 * x.nbytes / statistics.median(timed(x.clone)) * 1e3


def measure(kernel: str, case: Case, rate: float) -> Iterator[Run]:
    """A run for each launch configuration, and one for the compiled reference."""
    from triton.runtime.errors import OutOfResources

    torch._dynamo.reset()
    compiled = torch.compile(case.reference, dynamic=False)
    for label, function in {**case.launches, "torch.compile": compiled}.items():
        call = partial(function, *case.inputs)
        run: Run = {"date": date.today().isoformat(), "kernel": kernel, "size": case.size, "launch": label}
        try:
            run["sqnr_db"] = case.check(call())
        except OutOfResources as error:
            yield run | {"error": str(error)[:200]}
            continue
        times = timed(call)
        speed = case.moved / statistics.median(times) * 1e3
        yield run | {
            "ms": statistics.median(times), "all_ms": times, "moved": case.moved, "bytes_per_s": speed,
            "of_copy_rate": speed / rate, "copy_rate": rate, "each_kernel_us": each_kernel(call),
        }  # fmt: skip


def row(run: Run) -> list[str]:
    head = [run["kernel"], run["size"], run["launch"]]
    if "error" in run:
        return [*head, run["error"], *[""] * (len(COLUMNS) - 4)]
    times = run["all_ms"]
    parts = ", ".join(f"{name.strip('_')[:24]} {time:.0f}" for name, time in run["each_kernel_us"].items())
    return [
        *head, f"{run['sqnr_db']:.1f}", f"{run['ms']:.4f}",
        f"{times[len(times) // 10]:.4f} to {times[len(times) * 9 // 10]:.4f}", f"{run['moved'] / 1e6:.0f}",
        f"{run['bytes_per_s'] / 1e12:.2f}", f"{run['of_copy_rate']:.0%}", parts,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS), metavar="NAME")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--default-launch", action="store_true", help="no other launch configurations")
    parser.add_argument("--out", type=Path, help="folder of the dated table and JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise SystemExit("bench_kernels.py needs an NVIDIA GPU with FP8 units (compute capability 8.9 or newer)")
    where, rate, runs = environment(), copy_rate(), []
    print(f"copy rate {rate / 1e12:.2f} TB/s, read and written", *COLUMNS, sep=" | ", flush=True)
    for kernel in options.only:
        for case in KERNELS[kernel](options.sizes):
            if options.default_launch:
                case = replace(case, launches={"default": case.launches["default"]})
            for run in measure(kernel, case, rate):
                runs.append(run | {"environment": where})
                print(" | ".join(row(run)), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        title = f"# Own kernels: {where['device']}, {runs[0]['date']}\n\nCopy rate {rate / 1e12:.2f} TB/s. "
        text = f"{title}{versions(where)}.\n\n{markdown(COLUMNS, [row(run) for run in runs])}"
        print(write_dated(options.out, "kernels", where["device"], runs, text))


if __name__ == "__main__":
    main()
