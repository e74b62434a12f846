"""The steps of a run of any length as at most 128 blocks: what a detector that runs beside the training can afford."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kpt_lightning.tracking.noise import Array

CAPACITY = 128
"""Blocks kept; at most this many are tested at once."""

STEPS = 32
"""Steps in a block at first. Neighbouring steps are alike; the medians of 32 of them are nearly independent."""

MOST_STEPS = 512
"""Steps in a block at last, so that a change late in a long run is seen within about 1,500 steps."""


@dataclass(frozen=True, slots=True)
class Block:
    """Summary of some neighbouring steps.

    Attributes:
        first_step: Number of its first step.
        step_time: Median time of a step, in seconds.
        data_wait: Mean host time in the loader without its two longest waits, in seconds; NaN where nobody told.
        work: Median work of a step: tokens, else samples; NaN where unknown.
        memory: Bytes allocated at its end; NaN where unknown.
        clock: Clock of the device's multiprocessors at its end, in MHz; NaN where it was not read.
    """

    first_step: float
    step_time: float
    data_wait: float
    work: float
    memory: float
    clock: float


FIELDS = tuple(Block.__slots__)
_AT = {name: place for place, name in enumerate(FIELDS)}


class Blocks:
    """Blocks in order.

    When 128 are there neighbours become one, so that a block holds twice the steps, up to 512. From then on the first
    half stays as it is, to compare with, and the second half holds the newest blocks.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._data: Array = np.empty((CAPACITY, len(FIELDS)))
        self._pending: list[Block] = []
        self._count = 0
        self.steps = STEPS

    def __len__(self) -> int:
        """Blocks kept."""
        return self._count

    def column(self, name: str) -> Array:
        """One field of all blocks, oldest first; valid until the next block comes."""
        return self._data[: self._count, _AT[name]]

    def add(self, block: Block) -> bool:
        """Append a block of :data:`STEPS` steps. True where the row of blocks grew by it."""
        self._pending.append(block)
        if len(self._pending) * STEPS < self.steps:
            return False
        row = _merged(np.array([[getattr(one, name) for name in FIELDS] for one in self._pending]))
        self._pending.clear()
        if self._count == CAPACITY:
            self._make_room()
        self._data[self._count] = row
        self._count += 1
        if self._count == CAPACITY and self.steps < MOST_STEPS:
            self._data[: CAPACITY // 2] = _halved(self._data)
            self._count, self.steps = CAPACITY // 2, 2 * self.steps
        return True

    def _make_room(self) -> None:
        half = CAPACITY // 2
        self._data[half:-1] = self._data[half + 1 :]
        self._count -= 1


def _merged(rows: Array) -> Array:
    """Several blocks as one: the first step of the first, the mean of what was read."""
    if len(rows) == 1:
        return np.asarray(rows[0])
    known: NDArray[np.bool_] = ~np.isnan(rows)
    count = known.sum(0)
    total = np.where(known, rows, 0.0).sum(0)
    merged = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    merged[0] = rows[0, 0]
    return np.asarray(merged)


def _halved(rows: Array) -> Array:
    return np.stack([_merged(rows[place : place + 2]) for place in range(0, len(rows), 2)])
