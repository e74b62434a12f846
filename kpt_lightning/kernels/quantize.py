"""Casting to FP8 with one scale found from the tensor, written in the two layouts that Hopper's FP8 GEMM wants.

That GEMM reads both operands along the contracted dimension, so an (M, K) tensor is needed as it is for one GEMM and as
its physical transpose for another (https://docs.nvidia.com/cuda/cublas/#cublasltmatmul, "TN format").
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kpt_lightning.kernels.triton_module import triton_module

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""What can be written."""

TINY_AMAX = 1e-12
"""A zero tensor must not give an infinite scale."""

Quantized = tuple[Tensor, Tensor, Tensor]


def quantize(x: Tensor, dtype: torch.dtype, *, rows: bool = True, columns: bool = True) -> Quantized:
    """Cast ``x`` to FP8, its largest magnitude becoming the largest FP8 value.

    NaN and infinity are not hidden: they come out as NaN. Two kernels on CUDA, of which each reads ``x`` once; the same
    bits every time. No gradient passes.

    Args:
        x: (M, K), bf16, fp16 or fp32, any strides; read without a copy where ``x.stride(1) == 1``.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        rows: Whether to write the layout of ``x``.
        columns: Whether to write the transpose.

    Returns:
        (M, K) and (K, M) in ``dtype``, both contiguous, (0,) where not wanted; and the fp32 scale, a scalar tensor,
        that *multiplies* them to get ``x`` back.

    Raises:
        ValueError: ``x`` has not two dimensions, or a dtype is none of the above.
    """
    return quantize_many([x], dtype, rows=rows, columns=columns)


def quantize_many(
    parts: Sequence[Tensor], dtype: torch.dtype, *, dim: int = 1, rows: bool = True, columns: bool = True
) -> Quantized:
    """``quantize(torch.cat(parts, dim), ...)`` without the concatenation.

    Args:
        parts: At least one; for ``dim=1`` (M, K_i), side by side, as gradients of merged linear layers; for ``dim=0``
            (N_i, K), stacked, as their weights. Otherwise as ``x`` in ``quantize``, all of one dtype and device.
        dtype: As in ``quantize``.
        dim: 0 or 1.
        rows: As in ``quantize``.
        columns: As in ``quantize``.

    Returns:
        As ``quantize``, for the whole.

    Raises:
        ValueError: As in ``quantize``; or the parts do not fit together.
    """
    parts = list(parts)
    _check(parts, dtype, dim)
    result: Quantized = torch.ops.kpt.quantize(parts, dtype, dim, rows, columns)
    return result


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp32 factor that brings ``amax``, of any shape, to the largest value of ``dtype``."""
    return torch.finfo(dtype).max / amax.float().clamp(min=TINY_AMAX)


def cast_both(x: Tensor, dtype: torch.dtype, rows: bool = True, columns: bool = True) -> Quantized:
    """``quantize`` in plain PyTorch: the reference, and what runs on a CPU. Arguments and result as there."""
    largest = torch.finfo(dtype).max
    scale = scale_of(x.abs().amax() if x.numel() else x.new_zeros(()), dtype)
    written = (x.float() * scale).clamp(-largest, largest).to(dtype).contiguous()
    nothing = written.new_empty((0,))
    # A transpose with a side of one would share the memory of the rows.
    transposed = written.t().clone(memory_format=torch.contiguous_format) if columns else nothing
    return written if rows else nothing.clone(), transposed, scale.reciprocal()


def joined_shape(parts: Sequence[Tensor], dim: int) -> tuple[int, int]:
    """Shape of ``torch.cat(parts, dim)``."""
    joined, other = sum(part.shape[dim] for part in parts), parts[0].shape[1 - dim]
    return (joined, other) if dim == 0 else (other, joined)


def _check(parts: Sequence[Tensor], dtype: torch.dtype, dim: int) -> None:
    if dtype not in FLOAT8:
        raise ValueError(f"dtype={dtype}: must be one of {FLOAT8}")
    if not parts or dim not in (0, 1):
        raise ValueError(f"{len(parts)} tensors joined along dim={dim}: at least one, and dim 0 or 1")
    if any(part.dim() != 2 or part.dtype not in (torch.bfloat16, torch.float16, torch.float32) for part in parts):
        raise ValueError(f"{[(*part.shape, part.dtype) for part in parts]}: two dimensions each, bf16, fp16 or fp32")
    if len({(part.shape[1 - dim], part.dtype, part.device) for part in parts}) > 1:
        raise ValueError(f"{[(*part.shape, part.dtype) for part in parts]} do not fit together along dim={dim}")


def _run_reference(parts: list[Tensor], dtype: torch.dtype, dim: int, rows: bool, columns: bool) -> Quantized:
    return cast_both(torch.cat(parts, dim), dtype, rows, columns)


def _run_triton(parts: list[Tensor], dtype: torch.dtype, dim: int, rows: bool, columns: bool) -> Quantized:
    with torch.cuda.device_of(parts[0]):  # type: ignore[no-untyped-call]
        result: Quantized = triton_module("quantize").quantize(parts, dtype, dim, rows, columns)
        return result


def _shape(parts: list[Tensor], dtype: torch.dtype, dim: int, rows: bool, columns: bool) -> Quantized:
    height, width = joined_shape(parts, dim)
    return empty_outputs(parts[0], height, width, dtype, rows, columns)


def empty_outputs(
    like: Tensor, height: int, width: int, dtype: torch.dtype, rows: bool = True, columns: bool = True
) -> Quantized:
    """Memory for both layouts of (height, width) and the scale, on the device of ``like``; for a fake, only shapes."""
    return (
        torch.empty((height, width) if rows else (0,), dtype=dtype, device=like.device),
        torch.empty((width, height) if columns else (0,), dtype=dtype, device=like.device),
        torch.empty((), dtype=torch.float32, device=like.device),
    )


_library: Any = torch.library.Library("kpt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "quantize(Tensor[] parts, ScalarType dtype, int dim, bool rows, bool columns) -> (Tensor, Tensor, Tensor)"
)
_library.impl("quantize", _run_reference, "CPU")
_library.impl("quantize", _run_triton, "CUDA")
torch.library.register_fake("kpt::quantize", _shape, lib=_library)
