"""How many rows of a batch fit, and which number of them is the fastest."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kpt_lightning.errors import ConfigError
from kpt_lightning.measure.batch import batch_size
from kpt_lightning.measure.interleave import timed
from kpt_lightning.measure.memory import peak_memory, reset_peak
from kpt_lightning.measure.statistics import median

_TIMED_RUNS = 3


@dataclass(frozen=True, slots=True)
class BatchPoint:
    """What one size of batch gave.

    Attributes:
        size: Rows.
        samples_per_second: Rows over the median time of a run.
        peak_bytes: Peak memory: of the runs on CUDA, of the process since it started on a CPU, None elsewhere.
    """

    size: int
    samples_per_second: float
    peak_bytes: int | None


def largest_batch(
    run: Callable[[Any], object], batch: Any, limit: int, *, device: torch.device | str, max_seconds: float = 60.0
) -> list[BatchPoint]:
    """Run with 1, 2, 4 ... times the rows of a batch, until memory, ``limit`` or time is at an end.

    Rows are repeated, so this tells of time and memory and nothing of training.

    Args:
        run: Does one forward and backward pass and drops its gradients.
        batch: Any pytree or mapping of tensors; those with as many rows as the batch has are repeated.
        limit: Most rows to try.
        device: Where ``run`` computes.
        max_seconds: No size is begun after that.

    Returns:
        One point for each size that fits, in rising order; empty where not even the batch itself does.

    Raises:
        ConfigError: The batch has no rows, or more than ``limit``.
    """
    counted = batch_size(batch)
    rows = 0 if counted is None else counted.samples
    if not 0 < rows <= limit:
        raise ConfigError("limit", limit, f"the batch has {rows} rows", "Give a batch with rows and a limit above them")
    device, start, points, size = torch.device(device), time.perf_counter(), list[BatchPoint](), rows
    while size <= limit and time.perf_counter() - start < max_seconds:
        point = _point(run, batch, rows, size, device)
        _release(device)
        if point is None:
            break
        points.append(point)
        size *= 2
        if device.type == "cpu" and not _host_has_room(point):
            break
    return points


def repeat_rows(batch: Any, rows: int, times: int) -> Any:
    """A batch with its rows repeated.

    Args:
        batch: As :func:`largest_batch`.
        rows: How many it has; tensors of another first dimension stay as they are.
        times: How often each row appears.
    """

    def repeat(item: Any) -> Any:
        if isinstance(item, Tensor) and item.dim() > 0 and item.shape[0] == rows:
            return item.repeat(times, *[1] * (item.dim() - 1))
        return item

    # A mapping that torch does not know, such as a BatchEncoding, would count as one leaf.
    return tree_map(repeat, dict(batch) if isinstance(batch, Mapping) else batch)


def _point(run: Callable[[Any], object], batch: Any, rows: int, size: int, device: torch.device) -> BatchPoint | None:
    """The point, or None where memory is at an end."""
    try:
        larger = repeat_rows(batch, rows, size // rows)
        reset_peak(device)
        times = [_seconds(run, larger, device) for _ in range(_TIMED_RUNS + 1)]
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:
        # The allocator for host memory has no exception of its own: c10/core/impl/alloc_cpu.cpp.
        if "can't allocate memory" in str(error):
            return None
        raise
    peak, middle = peak_memory(device), median(times[1:])
    assert middle is not None
    return BatchPoint(size, size / middle, None if peak is None else peak.peak_bytes)


def _seconds(run: Callable[[Any], object], batch: Any, device: torch.device) -> float:
    return max(timed(lambda: run(batch), device), 1e-9)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _host_has_room(point: BatchPoint) -> bool:
    """Twice the memory of this process at its peak is there: Linux kills a process where it is not."""
    return point.peak_bytes is not None and point.peak_bytes < psutil.virtual_memory().available
