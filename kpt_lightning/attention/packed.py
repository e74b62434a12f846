"""Rows that hold several sequences behind each other, told by positions that start again."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_NAME = "position_ids"
"""As transformers names it."""


def packed_lengths(batch: Any) -> list[list[int]] | None:
    """Lengths of the sequences in each row.

    Args:
        batch: Any pytree; a mapping with integer ``position_ids`` of (rows, tokens) is looked into.

    Returns:
        None where there are no positions, or no row holds more than one sequence.
    """
    positions = batch.get(_NAME) if isinstance(batch, Mapping) else None
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.is_floating_point():
        return None
    if positions.shape[1] < 2:
        return None
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=1) != 1
    rows = [[*row.nonzero().flatten().tolist(), positions.shape[1]] for row in starts.cpu()]
    lengths = [[end - start for start, end in pairwise(row)] for row in rows]
    return lengths if any(len(row) > 1 for row in lengths) else None


def packing_advice(batch: Any) -> str | None:
    """What a packed batch wastes under a mask tensor, and what would be needed; None where nothing is packed."""
    lengths = packed_lengths(batch)
    if lengths is None:
        return None
    # A sequence of n tokens attends to n (n + 1) / 2 pairs; under a mask tensor each row computes all of its pairs.
    useful = sum(n * (n + 1) / 2 for row in lengths for n in row)
    computed = sum(sum(row) ** 2 for row in lengths)
    packed = f"{sum(map(len, lengths))} sequences are packed into {len(lengths)} rows (position_ids start again)"
    return (
        f"{packed}, and a mask tensor that keeps them apart computes {computed / useful:.1f}x the useful FLOPs; a "
        "kernel for sequences of any length (attn_implementation='flash_attention_2' with the flash-attn package) or "
        "a block mask (attn_implementation='flex_attention') would leave that out, and is yours to set"
    )
