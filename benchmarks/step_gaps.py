"""Where the GPU waits within training steps: idle time between kernels, by what ran before and after.

    python benchmarks/step_gaps.py --variant kpt --out gaps.json    # a GPU; arguments as train_variant.py

Profiles a few late steps of one process. Kernels of all streams are laid over each other; what no kernel or copy covers
is a gap.
"""

import json
from collections import Counter
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from llama import SHAPES, CausalLM, random_loader
from train_variant import Clock, environment, make_trainer, parse

PROFILED = 4


class Trace(Callback):
    """Profiles the last steps as one piece, with the host's side."""

    def __init__(self, first: int) -> None:
        self.first, self.profiler = first, None
        self.intervals: list[tuple[float, float, str]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        if index == self.first:
            torch.cuda.synchronize()
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if self.profiler is None:
            raise SystemExit(f"no step {self.first} was trained; raise --steps")
        torch.cuda.synchronize()
        self.profiler.__exit__(None, None, None)
        self.intervals = kernel_intervals(self.profiler)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("step_gaps needs an NVIDIA GPU, and torch sees none")
    options = parse()
    seed_everything(options.seed)
    torch.set_float32_matmul_precision("high")
    vocab_size = options.vocab_size or SHAPES[options.shape]["vocab_size"]
    module = CausalLM(options.shape, options.learning_rate, vocab_size, options.warmup)
    trainer, trace = make_trainer(options, module, Clock(None)), Trace(options.steps - PROFILED)
    trainer.callbacks.append(trace)
    trainer.fit(module, random_loader(vocab_size, options.batch, options.length, options.steps))
    report = read_gaps(trace.intervals, PROFILED) | {"variant": options.variant, "environment": environment()}
    options.out.write_text(json.dumps(report, indent=1))
    print(f"{options.variant}: {report['span_ms']:.1f} ms a step, {report['idle_ms']:.1f} ms of it idle")
    for before, after, count, total, longest in report["gaps"][:25]:
        print(f"{total:8.3f} ms {count:6.1f} x, longest {longest:.3f} ms: {before[:60]} -> {after[:60]}")


def kernel_intervals(profiler: Any) -> list[tuple[float, float, str]]:
    """Begin and end in microseconds, and name, of what ran on the GPU, in order."""
    return sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("##", "Optimizer."))
    )


def read_gaps(intervals: list[tuple[float, float, str]], steps: int) -> dict[str, Any]:
    """Milliseconds a step: whole span, idle time, (before, after, count, total, longest) of each kind of gap, and
    (kernel, count, total)."""
    kernels: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for start, end, name in intervals:
        kernels[name] += (end - start) / 1e3
        launches[name] += 1
    totals: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    longest: dict[tuple[str, str], float] = {}
    covered, last = intervals[0][1], intervals[0][2]
    for start, end, name in intervals[1:]:
        if (gap := (start - covered) / 1e3) > 0:
            key = last, name
            totals[key] += gap
            counts[key] += 1
            longest[key] = max(gap, longest.get(key, 0.0))
        if end > covered:
            covered, last = end, name
    gaps = [(*key, counts[key] / steps, total / steps, longest[key]) for key, total in totals.most_common()]
    span = (covered - intervals[0][0]) / 1e3
    return {
        "span_ms": span / steps, "idle_ms": totals.total() / steps, "gaps": gaps,
        "kernels": [(name, launches[name] / steps, total / steps) for name, total in kernels.most_common()],
    }  # fmt: skip


if __name__ == "__main__":
    main()
