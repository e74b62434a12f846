"""From which size on the kernels of this package are worth their launches."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

LEAST_ELEMENTS = 2**25
"""Rows times features of an input. Each operator costs the host about 0.1 ms. One H200, the 1B shape: at 16384 x 2048 a
step has 214 ms with the kernels and 229 without; at 4096 x 2048 it had 113, waiting for the host, and 57
(benchmarks/results/loss_text_nvidia-h200_2026-11-23.md). Nothing between was measured."""

_at_every_size = False


def worth_kernels(x: Tensor) -> bool:
    """Whether an input is large enough; below, layers run one by one as ``Float8Linear`` does."""
    return _at_every_size or x.numel() >= LEAST_ELEMENTS


@contextmanager
def at_every_size() -> Iterator[None]:
    """Use them on any input: a check looks at a few rows."""
    global _at_every_size
    before, _at_every_size = _at_every_size, True
    try:
        yield
    finally:
        _at_every_size = before
