"""Peak memory of a run."""

import sys
from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Peak memory in bytes.

    Attributes:
        peak_bytes: Most bytes in use at once.
        reserved_bytes: Most bytes that torch's allocator held, None where there is no such allocator.
        source: What was read, and since when.
    """

    peak_bytes: int
    reserved_bytes: int | None
    source: str


def reset_peak(device: torch.device | str) -> None:
    """Start a new peak on CUDA. Elsewhere nothing can be reset."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device | str) -> PeakMemory | None:
    """The peak: on CUDA since :func:`reset_peak`, on CPU the resident set since the process started, else None."""
    kind = torch.device(device).type
    if kind == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        return PeakMemory(torch.cuda.max_memory_allocated(device), reserved, "CUDA allocator, since the start of fit")
    if kind == "cpu":
        return PeakMemory(peak_resident_bytes(), None, "resident set of the process, since the process started")
    return None


def peak_resident_bytes() -> int:
    """Peak resident set of this process since it started, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage counts KiB on Linux and bytes on macOS: https://man7.org/linux/man-pages/man2/getrusage.2.html
    return peak if sys.platform == "darwin" else peak * 1024
