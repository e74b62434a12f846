"""Figures that say how close two tensors are."""

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise ratio, in dB: ``20 log10(|reference| / |reference - value|)``.

    FP8 e4m3 with one scale per tensor gives about 25 to 32 dB on normal data; bf16 about 50.
    Definition as in torchao (https://github.com/pytorch/ao/blob/main/torchao/quantization/utils.py).

    Args:
        reference: The exact tensor, any shape.
        value: The approximation, the same shape.

    Returns:
        Infinity where both are equal, NaN where either holds a NaN.
    """
    exact, approximate = reference.detach().double(), value.detach().double()
    noise = torch.linalg.vector_norm(exact - approximate)
    if noise == 0:
        return float("inf")
    return float(20 * torch.log10(torch.linalg.vector_norm(exact) / noise))


def relative_error(reference: Tensor, value: Tensor) -> float:
    """``|reference - value| / |reference|``, Euclidean norms over all elements."""
    exact, approximate = reference.detach().double(), value.detach().double()
    return float(torch.linalg.vector_norm(exact - approximate) / torch.linalg.vector_norm(exact))
