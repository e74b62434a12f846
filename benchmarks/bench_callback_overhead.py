"""Host time that RegressionCallback spends inside its own hooks, per training step.

Each hook is wrapped by clock reads, whose own cost is part of the figure. On a machine that other processes share, the
median of the thread's own CPU time says what the callback costs; wall time also holds the waits for a core. The share
is of the measured step and of the target's 250 ms step.

    python benchmarks/bench_callback_overhead.py [--device cpu|cuda] [--steps 500] [--accumulate 1] [--json out.json]
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kpt_lightning.callbacks import RegressionCallback
from kpt_lightning.callbacks.fetch_probe import FetchProbe
from kpt_lightning.measure import statistics

TARGET_STEP_SECONDS = 0.250
TARGET_SHARE = 0.001
HOOKS = ("on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "on_validation_start")


class Tokens(Dataset):
    def __init__(self, rows, length):
        self.rows, self.length = rows, length

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        ids = torch.full((self.length,), index % 100)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Net(pl.LightningModule):
    def __init__(self, width, depth):
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)))

    def training_step(self, batch, batch_idx):
        return self.layers(self.embed(batch["input_ids"])).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Timed(RegressionCallback):
    """RegressionCallback with a stopwatch around every per-step hook."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds, self.cpu_seconds = defaultdict(list), defaultdict(list)
        for name in HOOKS:
            setattr(self, name, self._timed(name, getattr(self, name)))

    def _timed(self, name, hook):
        def call(*args, **kwargs):
            start, cpu = time.perf_counter(), time.thread_time()
            hook(*args, **kwargs)
            self.cpu_seconds[name].append(time.thread_time() - cpu)
            self.seconds[name].append(time.perf_counter() - start)

        return call


def probe_cost(count=20_000):
    """Seconds per step that timing the loader adds to the trainer's profiler."""

    class Nothing:
        def start(self, action_name):
            pass

        def stop(self, action_name):
            pass

    class Trainer:
        profiler = Nothing()

    def once():
        start = time.perf_counter()
        for _ in range(count):
            Trainer.profiler.start("[_TrainingEpochLoop].train_dataloader_next")
            Trainer.profiler.stop("[_TrainingEpochLoop].train_dataloader_next")
        return (time.perf_counter() - start) / count

    from kpt_lightning.measure.timer import StepTimer

    bare = once()
    probe = FetchProbe(Trainer, StepTimer("cpu"))
    probed = once()
    probe.remove()
    return probed - bare


def steady_sums(times):
    """Per batch, start and end hook together, without the first tenth."""
    sums = [sum(pair) for pair in zip(*(times[name] for name in HOOKS[:2]), strict=True)]
    return sums[len(sums) // 10 :]


def measure(arguments):
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        callback = Timed(Path(folder) / "runs.sqlite", print_report=False)
        trainer = pl.Trainer(
            accelerator="gpu" if arguments.device == "cuda" else "cpu", devices=1, max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accumulate_grad_batches=arguments.accumulate, precision=arguments.precision,
        )  # fmt: skip
        trainer.callbacks.append(callback)
        rows = arguments.steps * arguments.accumulate * arguments.batch
        trainer.fit(Net(arguments.width, arguments.depth), DataLoader(Tokens(rows, arguments.length), arguments.batch))
    steady, cpu = (steady_sums(times) for times in (callback.seconds, callback.cpu_seconds))
    probe = probe_cost()
    step = callback.record.metrics["step_time"].median
    middle = (statistics.median(steady) + probe) * arguments.accumulate
    mean = (sum(steady) / len(steady) + probe) * arguments.accumulate
    return {
        "device": callback.record.key.device,
        "steps": len(steady) // arguments.accumulate,
        "hooks_median_us": middle * 1e6,
        "hooks_mean_us": mean * 1e6,
        "hooks_cpu_median_us": statistics.median(cpu) * arguments.accumulate * 1e6,
        "hooks_p99_us": (statistics.quantile(steady, 0.99) + probe) * arguments.accumulate * 1e6,
        "loader_probe_us": probe * 1e6,
        "step_ms": step * 1e3,
        "share_of_step": mean / step,
        "share_of_250_ms": mean / TARGET_STEP_SECONDS,
        "target_met": mean / TARGET_STEP_SECONDS <= TARGET_SHARE,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="32-true")
    for name, default in (
        ("steps", 500),
        ("accumulate", 1),
        ("batch", 4),
        ("length", 128),
        ("width", 256),
        ("depth", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    for name, value in result.items():
        print(f"{name:>18}  {value:.6g}" if isinstance(value, float) else f"{name:>18}  {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
