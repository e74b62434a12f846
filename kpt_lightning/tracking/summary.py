"""From what was observed to metrics."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kpt_lightning.decision import Rejected
from kpt_lightning.hardware import HardwareProfile
from kpt_lightning.measure.flops import training_flops
from kpt_lightning.measure.memory import PeakMemory
from kpt_lightning.measure.timer import StepTimes
from kpt_lightning.tracking.compilation import Compilation
from kpt_lightning.tracking.record import Metric
from kpt_lightning.tracking.series import Work, is_judged_mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything that a run showed, see :class:`kpt_lightning.tracking.recorder.RunRecorder`."""

    steady: Sequence[StepTimes]
    first: StepTimes | None
    warmup: int
    warmup_asked: int
    memory: PeakMemory | None
    losses: Sequence[float]
    finite: bool | None
    clock: str
    dropped: int
    model: nn.Module
    precision: str
    profile: HardwareProfile
    flops_per_step: float | None
    marks: Mapping[int, float] = field(default_factory=dict)
    compilation: Compilation | None = None
    stalls: Sequence[float] = ()


def summarize(seen: Observed) -> tuple[dict[str, Metric], dict[str, Any], tuple[str, ...]]:
    """Metrics, details and notes of a run; without a steady step those of its memory and compilation."""
    details: dict[str, Any] = {"clock": seen.clock, "warmup_steps": seen.warmup}
    notes: list[str] = []
    if seen.warmup < seen.warmup_asked:
        notes.append(f"warm-up shrunk from {seen.warmup_asked} to {seen.warmup} steps: the run was short")
    if seen.dropped:
        notes.append(f"{seen.dropped} steps not timed: the device was too far behind")
    found: dict[str, Metric | None] = {
        "step_time": Metric.of([step.compute for step in seen.steady], "s", "lower"),
        "data_wait": Metric.of([step.data_wait for step in seen.steady if step.data_wait is not None], "s", "lower"),
        **_throughput(seen.steady),
        **_utilization(seen, details, notes),
        **_memory(seen.memory, details),
        **_compilation(seen.compilation),
        "checkpoint_stall": Metric.of(seen.stalls, "s", "lower"),
    }
    if seen.first is not None and seen.first.context.index == 1 and seen.warmup:
        found["first_step_time"] = Metric(median=seen.first.compute, unit="s", better="lower")
    if seen.finite:
        found["final_loss"] = Metric.of(seen.losses, "1", "lower")
        found |= {
            f"loss_at_{step}": Metric(median=loss, unit="1", better="lower")
            for step, loss in seen.marks.items()
            if is_judged_mark(step)
        }
    elif seen.finite is False:
        notes.append("a loss was not finite")
    return {name: metric for name, metric in found.items() if metric is not None}, details, tuple(notes)


def common_shape(steady: Sequence[StepTimes]) -> list[int] | str:
    """The batch shape of most steps; else what is left to say, as padded batches vary from run to run."""
    shapes = Counter(_work(step).shape for step in steady)
    shape, count = shapes.most_common(1)[0]
    if shape is None:
        return "unknown"
    if 2 * count > len(steady):
        return list(shape)
    rows = Counter(key[0] for key in shapes.elements() if key).most_common(1)[0][0]
    return f"varying, {rows} rows"


def most_batches(steady: Sequence[StepTimes]) -> int:
    """Batches that most steps accumulated."""
    return Counter(_work(step).batches for step in steady).most_common(1)[0][0]


def peak_dtype(precision: str, device_type: str) -> str | None:
    """The dtype of most matmuls under a trainer's precision string, as ``HardwareProfile.peak_flops`` names it."""
    if any(mark in precision for mark in ("fp8", "float8", "transformer-engine")):
        return "float8"
    if "bf16" in precision:
        return "bfloat16"
    if "16" in precision:
        return "float16"
    if "32" in precision:
        lowered = device_type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        return "tf32" if lowered else "float32"
    return None


def _work(step: StepTimes) -> Work:
    work: Work = step.context
    return work


def _throughput(steady: Sequence[StepTimes]) -> dict[str, Metric | None]:
    timed = [(step.period, _work(step)) for step in steady if step.period > 0]
    tokens = [work.tokens / period for period, work in timed if work.tokens is not None]
    if tokens:
        return {"tokens_per_second": Metric.of(tokens, "tokens/s", "higher")}
    rows = [work.samples / period for period, work in timed if work.samples]
    return {"samples_per_second": Metric.of(rows, "samples/s", "higher")}


def _utilization(seen: Observed, details: dict[str, Any], notes: list[str]) -> dict[str, Metric | None]:
    if not seen.steady:
        return {}
    dtype = peak_dtype(seen.precision, seen.profile.kind)
    peak = None if dtype is None else seen.profile.peak_flops(dtype)
    flops = _flops_of_steps(seen, details)
    if isinstance(flops, Rejected):
        notes.append(f"no MFU: {flops.reason}")
        return {}
    if peak is None:
        notes.append(f"no MFU: no peak rate known for {seen.profile.primary.name} in {dtype or seen.precision}")
        return {}
    details["peak"] = {"dtype": dtype, "flops": peak.flops, "source": peak.source}
    timed = zip(flops, (step.period for step in seen.steady), strict=True)
    return {"mfu": Metric.of([work / (period * peak.flops) for work, period in timed if period > 0], "1", "higher")}


def _flops_of_steps(seen: Observed, details: dict[str, Any]) -> list[float] | Rejected:
    """Per steady step. The count is linear in tokens and in tokens times length, so the model is walked only twice."""
    if seen.flops_per_step is not None:
        details["flops"] = {"per_step": seen.flops_per_step, "formula": "given as flops_per_step"}
        return [seen.flops_per_step] * len(seen.steady)
    works = [_work(step) for step in seen.steady]
    rows = [_rows(work) for work in works]
    if any(count is None for count in rows):
        return Rejected("flops", "tokens per batch unknown; give tokens_per_batch or flops_per_step")
    without = training_flops(seen.model, 2, 0)
    with_length = training_flops(seen.model, 2, 1)
    if isinstance(without, Rejected) or isinstance(with_length, Rejected):
        return without if isinstance(without, Rejected) else Rejected("flops", "no formula")
    per_token, per_position = without.flops / 2, (with_length.flops - without.flops) / 2
    if per_position and not any(work.token_positions for work in works):
        return Rejected("flops", "attention needs the sequence length; give flops_per_step")
    flops = [
        per_token * (count or 0) + per_position * work.token_positions for count, work in zip(rows, works, strict=True)
    ]
    details["flops"] = {"per_step": flops[-1], "formula": with_length.formula, "left_out": list(with_length.left_out)}
    return flops


def _rows(work: Work) -> int | None:
    """Rows that pass each linear layer: tokens, or the samples of a 2-D batch."""
    if work.tokens is not None:
        return work.tokens
    return work.samples if work.shape is not None and len(work.shape) == 2 else None


def _memory(memory: PeakMemory | None, details: dict[str, Any]) -> dict[str, Metric | None]:
    if memory is None:
        return {}
    details["memory"] = memory.source
    found: dict[str, Metric | None] = {
        "peak_memory": Metric(median=float(memory.peak_bytes), unit="bytes", better="lower")
    }
    if memory.reserved_bytes is not None:
        found["reserved_memory"] = Metric(median=float(memory.reserved_bytes), unit="bytes", better="lower")
    return found


def _compilation(compilation: Compilation | None) -> dict[str, Metric | None]:
    if compilation is None:
        return {}
    return {
        "compile_time": Metric(median=compilation.seconds, unit="s", better="lower"),
        "compiled_graphs": Metric(median=float(compilation.graphs), unit="1", better="lower"),
        "recompiles": Metric(median=float(compilation.recompiles), unit="1", better="lower"),
    }
