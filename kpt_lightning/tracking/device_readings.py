"""Readings of a device that cost no synchronisation: memory in use now, and the clock that it runs at."""

import math
import time

import psutil
import torch

CLOCK_SECONDS = 10.0
"""Between two readings of the clock: the driver is asked, which takes up to milliseconds."""


class DeviceReadings:
    """Of one device, NaN where it cannot be read."""

    def __init__(self, device: torch.device) -> None:
        """Choose what can be read; the driver is asked for the clock once, before any step is timed."""
        self._device = device
        self._process = psutil.Process() if device.type == "cpu" else None
        self._has_clock = device.type == "cuda"
        self._asked = -math.inf
        self.clock()

    def memory(self) -> float:
        """Bytes in use: on CUDA those of torch's allocator, on CPU the resident set of the process."""
        if self._device.type == "cuda":
            return float(torch.cuda.memory_allocated(self._device))
        return math.nan if self._process is None else float(self._process.memory_info().rss)

    def clock(self) -> float:
        """Clock of the multiprocessors in MHz; NaN within ten seconds of the last reading."""
        now = time.monotonic()
        if not self._has_clock or now - self._asked < CLOCK_SECONDS:
            return math.nan
        self._asked = now
        try:
            return float(torch.cuda.clock_rate(self._device))
        except (ModuleNotFoundError, RuntimeError, OSError):
            # No NVML, or a driver that keeps its clocks to itself: it will not change its mind.
            self._has_clock = False
            return math.nan
