"""Casting to FP8 with a scale found from the tensor itself (dynamic, or current, scaling)."""

import torch
from torch import Tensor

# A zero tensor must not give an infinite scale.
_TINY_AMAX = 1e-12


def to_float8(
    x: Tensor, dtype: torch.dtype, *, axis: int | None = None, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale ``x`` so that its largest magnitude is the largest FP8 value, and cast it.

    NaN and infinity are not hidden: they come out as NaN.

    Args:
        x: (rows, columns), any float dtype, any strides.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        axis: The axis reduced by one scale: -1 gives a scale per row (rows, 1), 0 one per column (1, columns),
            None one for the whole tensor (scalar).
        power_of_two: Round the scale down to a power of two.

    Returns:
        The FP8 tensor with the strides of ``x``, and the fp32 scale that *multiplies* it to get ``x`` back.
    """
    largest = torch.finfo(dtype).max
    amax = x.abs().amax() if axis is None else x.abs().amax(dim=axis, keepdim=True)
    scale = largest / amax.float().clamp(min=_TINY_AMAX)
    if power_of_two:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    scaled = (x.float() * scale).clamp(-largest, largest)
    return scaled.to(dtype), scale.reciprocal()
