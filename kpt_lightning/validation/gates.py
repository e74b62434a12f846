"""The one table of numerics gates: how far a changed model may be from the unchanged one."""

from dataclasses import dataclass
from enum import StrEnum

import torch


class Numerics(StrEnum):
    """What a change may do to the numbers."""

    SAME = "same"
    """The same operations: equal up to the order of sums."""
    ROUNDING = "rounding"
    """The same precision, other kernels: within what rounding moves in the unchanged model."""
    PRECISION = "precision"
    """Fewer bits somewhere: judged by what noise of that size does to the unchanged model, and by a loss run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Limits of one kind of change. A figure passes when it meets ``db`` or lies within ``spreads``.

    Attributes:
        output_db: SQNR of loss and outputs of the whole model, at least.
        gradient_db: SQNR of the worst gradient, at least.
        median_gradient_db: SQNR of the median gradient, at least.
        spreads: Or the error is at most this many times the rounding spread of the unchanged model; 0 allows none.
        layer_db: SQNR of one replaced layer against itself, output and each gradient, at least.
        loss_spreads: Loss after a short run: at most this many spreads of the unchanged model's own repeats above
            their mean; None where no run is asked for.
    """

    output_db: float
    gradient_db: float
    median_gradient_db: float
    spreads: float
    layer_db: float | None = None
    loss_spreads: float | None = None


# Rounding noise of a chain of operations in a dtype with p bits of mantissa is near 6.02 p + 10.8 dB for one of them
# (https://en.wikipedia.org/wiki/Signal-to-quantization-noise_ratio); what no chain of a hundred exceeds is "equal".
_EQUAL_DB = {torch.float64: 240.0, torch.float32: 110.0, torch.float16: 55.0, torch.bfloat16: 40.0}

# A layer's own products show a wrong scale (6 dB) or a wrong cast at once. Over a whole deep model the noise of a
# hundred right ones adds up: a Llama of 1.2 B parameters, which trains in FP8 as in bf16, has about 10 dB at its start.
# Below 0 dB a gradient is further from the exact one than no gradient; the loss run judges what lies between.
_PRECISION = Gate(output_db=6.0, gradient_db=0.0, median_gradient_db=5.0, spreads=0.0, layer_db=15.0, loss_spreads=2.0)

FP8_SPREADS = 2.0
"""Layers in FP8 may move a figure by this many times what noise of their size moves it in the unchanged model.

6 dB, which is one bit. Right ones move small Llama, BERT and ViT models less than the noise does. Rounding to bf16 has
the spreads of ROUNDING, for equal values in many rows are rounded the same way. The limits of the table stay the least
that is needed.
"""

PARITY_FACTOR = 4.0
"""A replaced module's error against a float64 copy of the original is at most this many times the original's own."""

PARITY_ULPS = 16.0
"""Or at most this many units of roundoff of its dtype, relative to the norm of the exact tensor."""


def gate(numerics: Numerics, dtype: torch.dtype) -> Gate:
    """The limits for a kind of change in a model whose products run in ``dtype``."""
    if numerics is Numerics.PRECISION:
        return _PRECISION
    equal = _EQUAL_DB[dtype]
    spreads = 2.0 if numerics is Numerics.SAME else 4.0
    return Gate(output_db=equal, gradient_db=equal, median_gradient_db=equal, spreads=spreads)
