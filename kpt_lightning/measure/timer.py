"""Real time per training step, without a device synchronisation per step."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

RING_SLOTS = 256
"""Steps whose events may wait to complete. CUDA's launch queue is far shorter, so a full ring means a hung device."""


@dataclass(slots=True)
class StepTimes:
    """Times of one optimizer step, in seconds.

    Attributes:
        compute: From batch start to batch end, summed over the batches of the step. On CUDA on the device's own time
            line, elsewhere the host's.
        gaps: Between its batches and since the step before, pauses excluded, on the same time line: the time in which
            the device stood still, which is what an input pipeline really costs.
        data_wait: Host time inside the data loader; None where nobody reported fetches.
        context: What the caller attached to the step.
    """

    compute: float
    gaps: float
    data_wait: float | None
    context: Any = None

    @property
    def period(self) -> float:
        """Real time from the end of the step before to the end of this one, pauses excluded, in seconds."""
        return self.compute + self.gaps


@dataclass(slots=True)
class _Batch:
    start: Any
    end: Any = None
    gap_counts: bool = True


@dataclass(slots=True)
class _Step:
    batches: list[_Batch] = field(default_factory=list)
    data_wait: float | None = None
    spoiled: bool = False
    context: Any = None


class StepTimer:
    """Times batches and groups them into optimizer steps.

    On CUDA each boundary records an event on the current stream, and an event is read only after ``query()`` says that
    it completed; on any other device the boundary is ``time.perf_counter``. With an asynchronous device other than
    CUDA (XLA, MPS) this is the time of dispatch, which follows the device's pace once its queue is full.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Make a timer for one device; nothing is touched before the first batch."""
        self.device = torch.device(device)
        self.dropped = 0
        self._events: list[torch.cuda.Event] = []
        self._ring: deque[_Step] = deque()
        self._done: list[StepTimes] = []
        self._step = _Step()
        self._last_end: Any = None
        self._gap_counts = True
        self._fetch_started: float | None = None

    @property
    def clock(self) -> str:
        """``"cuda_events"`` or ``"host"``."""
        return "cuda_events" if self.device.type == "cuda" else "host"

    def fetch_start(self) -> None:
        """The loader is asked for a batch."""
        self._fetch_started = time.perf_counter()

    def fetch_end(self) -> None:
        """The loader answered."""
        if self._fetch_started is not None:
            waited = time.perf_counter() - self._fetch_started
            self._step.data_wait = (self._step.data_wait or 0.0) + waited
            self._fetch_started = None

    def batch_start(self) -> None:
        """The forward pass of a batch is about to start."""
        if self._step.batches and self._step.batches[-1].end is None:
            self._step.batches.pop()  # it never ended: a hook skipped the rest of its epoch
        self._step.batches.append(_Batch(self._mark(), gap_counts=self._gap_counts))
        self._gap_counts = True

    def batch_end(self, *, step_done: bool = True, context: Any = None) -> None:
        """A batch's backward pass, and with ``step_done`` the optimizer step too, has been launched."""
        if not self._step.batches or self._step.batches[-1].end is not None:
            return
        self._step.batches[-1].end = self._mark()
        if step_done:
            self._step.context = context
            self._close_step()

    def pause(self) -> None:
        """Validation, a checkpoint or an epoch's end runs: leave out this gap, or the whole step it falls into."""
        self._gap_counts = False
        if self._step.batches and self._step.batches[-1].end is None:
            self._step.spoiled = True

    def drain(self) -> list[StepTimes]:
        """The steps that completed since the last call, oldest first. Never waits."""
        while self._ring and self._complete(self._ring[0]):
            self._read(self._ring.popleft())
        done, self._done = self._done, []
        return done

    def finish(self) -> list[StepTimes]:
        """Wait for the device once and return the remaining steps."""
        if self.device.type == "cuda" and self._ring:
            torch.cuda.synchronize(self.device)
        return self.drain()

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = self._events.pop() if self._events else _new_event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _close_step(self) -> None:
        self._ring.append(self._step)
        self._step = _Step()
        if len(self._ring) > RING_SLOTS:
            self._ring.popleft()
            self._last_end = None
            self.dropped += 1

    def _complete(self, step: _Step) -> bool:
        return self.device.type != "cuda" or bool(step.batches[-1].end.query())

    def _seconds(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - start)
        return float(start.elapsed_time(end)) * 1e-3

    def _read(self, step: _Step) -> None:
        compute = gaps = 0.0
        for batch in step.batches:
            compute += self._seconds(batch.start, batch.end)
            if batch.gap_counts and self._last_end is not None:
                gaps += self._seconds(self._last_end, batch.start)
            self._recycle(self._last_end)
            self._recycle(batch.start)
            self._last_end = batch.end
        if not step.spoiled:
            self._done.append(StepTimes(compute, gaps, step.data_wait, step.context))

    def _recycle(self, event: Any) -> None:
        if self.device.type == "cuda" and event is not None:
            self._events.append(event)


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
