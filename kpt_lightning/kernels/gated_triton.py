"""Triton kernels of gated activations and their gradients, cast to FP8 in both layouts."""

from typing import Any

import torch
import triton  # noqa: TID253
import triton.language as tl  # noqa: TID253
from torch import Tensor
from torch.nn import functional as F

from kpt_lightning.kernels.gated import GELU_BOUND, GELU_CUBIC, GELU_SLOPE
from kpt_lightning.kernels.quantize import Quantized, empty_outputs
from kpt_lightning.kernels.quantize_triton import (
    INTERPRETED,
    Config,
    in_words,
    is_ragged,
    larger,
    plan_amax,
    plan_cast,
    scale_from_bits,
    scale_of_nothing,
    store_amax,
    store_both,
    strip_indices,
    tile_start,
)

# On one H200: benchmarks/results/kernels_nvidia-h200_2026-11-23.md.
FORWARD_CONFIG = Config(
    amax_rows=4, amax_columns=1024, amax_warps=8, programs_per_sm=6,
    cast_rows=64, cast_columns=64, cast_warps=4, last_first=True,
)  # fmt: skip
BACKWARD_CONFIG = Config(
    amax_rows=2, amax_columns=1024, amax_warps=8, programs_per_sm=4,
    cast_rows=64, cast_columns=64, cast_warps=8, last_first=True,
)  # fmt: skip

_GELU_SLOPE = tl.constexpr(GELU_SLOPE)
_GELU_CUBIC = tl.constexpr(GELU_CUBIC)
_GELU_BOUND = tl.constexpr(GELU_BOUND)


@triton.jit  # type: ignore[untyped-decorator]
def _sigmoid(x: tl.tensor) -> Any:
    """1 / (1 + exp(-x)) to about 2**-21, without overflow to anything but the right limits, 0 and 1."""
    if INTERPRETED:
        small = tl.exp(-tl.abs(x))
        return tl.where(x < 0, small, 1.0) / (1.0 + small)
    # Triton's own exp and division care for numbers that 1 + exp(-x) cannot be, in three times the instructions.
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",
        "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _activated(gate: tl.tensor, ACTIVATION: tl.constexpr) -> Any:
    """The activation and its derivative, of fp32; as gated.py::_activated."""
    if ACTIVATION == "silu":
        share = _sigmoid(gate)
        slope = share * (1.0 + gate * (1.0 - share))
    else:
        bounded = tl.maximum(gate, -_GELU_BOUND, propagate_nan=tl.PropagateNan.ALL)
        bounded = tl.minimum(bounded, _GELU_BOUND, propagate_nan=tl.PropagateNan.ALL)
        square = bounded * bounded
        share = _sigmoid(bounded * (square * _GELU_CUBIC + 1.0) * (2.0 * _GELU_SLOPE))
        inner = (square * (3.0 * _GELU_CUBIC) + 1.0) * (2.0 * _GELU_SLOPE)
        slope = share + bounded * share * (1.0 - share) * inner
    return gate * share, slope


@triton.jit  # type: ignore[untyped-decorator]
def _load_value(place: tl.tensor, inside: tl.tensor, width: tl.tensor, ACTIVATION: tl.constexpr) -> Any:
    """``activation(gate) * up`` in fp32, of the gates at ``place``; ups are ``width`` further."""
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activated(gate, ACTIVATION)
    return value * up


@triton.jit  # type: ignore[untyped-decorator]
def _load_gradients(
    grad: tl.tensor, place: tl.tensor, inside: tl.tensor, width: tl.tensor, ACTIVATION: tl.constexpr
) -> Any:
    """Gradients of gate and up in fp32, of the gates at ``place`` and of the gradients at ``grad``."""
    outer = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activated(gate, ACTIVATION)
    return outer * up * slope, outer * value


@triton.jit  # type: ignore[untyped-decorator]
def _amax_kernel(
    gate_up: tl.tensor, amax: tl.tensor, height: tl.tensor, width: tl.tensor, stride: tl.tensor,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    first, step, column = strip_indices(width, BLOCK_ROWS, BLOCK_COLUMNS)
    largest = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    while first < height:
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < height)[:, None] & (column < width)[None, :]
        place = gate_up + row[:, None].to(tl.int64) * stride + column[None, :]
        largest = larger(largest, _load_value(place, inside, width, ACTIVATION))
        first += step
    store_amax(amax, largest)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_amax_kernel(
    grad: tl.tensor, gate_up: tl.tensor, amax: tl.tensor, height: tl.tensor, width: tl.tensor, grad_stride: tl.tensor,
    stride: tl.tensor, ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    first, step, column = strip_indices(width, BLOCK_ROWS, BLOCK_COLUMNS)
    largest = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    while first < height:
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < height)[:, None] & (column < width)[None, :]
        below = row[:, None].to(tl.int64)
        of_gate, of_up = _load_gradients(
            grad + below * grad_stride + column[None, :], gate_up + below * stride + column[None, :],
            inside, width, ACTIVATION,
        )  # fmt: skip
        largest = larger(larger(largest, of_gate), of_up)
        first += step
    store_amax(amax, largest)


@triton.jit  # type: ignore[untyped-decorator]
def _cast_kernel(
    gate_up: tl.tensor, amax: tl.tensor, rows: tl.tensor, columns: tl.tensor, inverse: tl.tensor, height: tl.tensor,
    width: tl.tensor, stride: tl.tensor, rows_stride: tl.tensor, columns_stride: tl.tensor,
    RAGGED: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr,
    LAST_FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    first_row, first_column = tile_start(width, LAST_FIRST, BLOCK_ROWS, BLOCK_COLUMNS)
    row, column = first_row + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < height)[:, None] & (column < width)[None, :]
    place = gate_up + row[:, None].to(tl.int64) * stride + column[None, :]
    value = _load_value(place, inside, width, ACTIVATION)
    scale = scale_from_bits(amax, LARGEST)
    if tl.program_id(0) == 0:
        tl.store(inverse, tl.div_rn(1.0, scale))
    store_both(
        value, scale, rows, columns, first_row, first_column, height, width, rows_stride, columns_stride,
        RAGGED, True, COLUMNS, LARGEST,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _backward_cast_kernel(
    grad: tl.tensor, gate_up: tl.tensor, amax: tl.tensor, rows: tl.tensor, columns: tl.tensor, inverse: tl.tensor,
    height: tl.tensor, width: tl.tensor, grad_stride: tl.tensor, stride: tl.tensor, columns_stride: tl.tensor,
    RAGGED: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr,
    LAST_FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    first_row, first_column = tile_start(width, LAST_FIRST, BLOCK_ROWS, BLOCK_COLUMNS)
    row, column = first_row + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < height)[:, None] & (column < width)[None, :]
    down = row[:, None].to(tl.int64)
    of_gate, of_up = _load_gradients(
        grad + down * grad_stride + column[None, :], gate_up + down * stride + column[None, :],
        inside, width, ACTIVATION,
    )  # fmt: skip
    scale = scale_from_bits(amax, LARGEST)
    if tl.program_id(0) == 0:
        tl.store(inverse, tl.div_rn(1.0, scale))
    # Both halves lie side by side in rows, and one below the other in columns.
    store_both(
        of_gate, scale, rows, columns, first_row, first_column, height, width, 2 * width, columns_stride,
        RAGGED, True, COLUMNS, LARGEST,
    )  # fmt: skip
    below = columns + tl.cast(width, tl.int64) * columns_stride
    store_both(
        of_up, scale, rows + width, below, first_row, first_column, height, width, 2 * width, columns_stride,
        RAGGED, True, COLUMNS, LARGEST,
    )  # fmt: skip


def gated_quantize(
    gate_up: Tensor, activation: str, dtype: torch.dtype, columns: bool, config: Config = FORWARD_CONFIG
) -> Quantized:
    """gated.py::gated_quantize by the kernels; on CUDA, or on a CPU under Triton's interpreter."""
    height, width = gate_up.shape[0], gate_up.shape[1] // 2
    written = empty_outputs(gate_up, height, width, dtype, columns=columns)
    if height * width == 0:
        return *written[:2], scale_of_nothing(gate_up, dtype)
    gate_up = _readable(gate_up)
    amax = torch.zeros(1, dtype=torch.int32, device=gate_up.device)
    sizes = (height, width, gate_up.stride(0))
    grid, constants = plan_amax(height, width, gate_up.device, config)
    _amax_kernel[grid](gate_up, amax, *sizes, ACTIVATION=activation, **constants)
    grid, constants = plan_cast(height, width, dtype, config)
    with in_words(written[0]) as in_rows, in_words(written[1]) as in_columns:
        _cast_kernel[grid](
            gate_up, amax, in_rows, in_columns, written[2], *sizes, in_rows.stride(0), in_columns.stride(0),
            RAGGED=is_ragged(height, width), ACTIVATION=activation, COLUMNS=columns, **constants,
        )  # fmt: skip
    return written


def gated_backward_quantize(
    grad: Tensor, gate_up: Tensor, activation: str, dtype: torch.dtype, columns: bool, config: Config = BACKWARD_CONFIG
) -> Quantized:
    """gated.py::gated_backward_quantize by the kernels; on CUDA, or on a CPU under Triton's interpreter."""
    height, width = grad.shape
    if width % 4:
        # The second half of a row has to begin with a word.
        pad = 4 - width % 4
        gate_up = F.pad(gate_up.reshape(height, 2, width), (0, pad)).flatten(1)
        wider = gated_backward_quantize(F.pad(grad, (0, pad)), gate_up, activation, dtype, columns, config)
        kept = torch.arange(2 * (width + pad), device=grad.device).view(2, -1)[:, :width].flatten()
        return wider[0][:, kept], wider[1][kept] if columns else wider[1], wider[2]
    written = empty_outputs(gate_up, height, 2 * width, dtype, columns=columns)
    if height * width == 0:
        return *written[:2], scale_of_nothing(gate_up, dtype)
    grad, gate_up = _readable(grad), _readable(gate_up)
    amax = torch.zeros(1, dtype=torch.int32, device=gate_up.device)
    sizes = (height, width, grad.stride(0), gate_up.stride(0))
    grid, constants = plan_amax(height, width, gate_up.device, config)
    _backward_amax_kernel[grid](grad, gate_up, amax, *sizes, ACTIVATION=activation, **constants)
    grid, constants = plan_cast(height, width, dtype, config)
    with in_words(written[1]) as in_columns:
        _backward_cast_kernel[grid](
            grad, gate_up, amax, written[0], in_columns, written[2], *sizes, in_columns.stride(0),
            RAGGED=is_ragged(height, width), ACTIVATION=activation, COLUMNS=columns, **constants,
        )  # fmt: skip
    return written


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
