"""Triton kernels of RMSNorm; each reads a tensor once."""

from dataclasses import dataclass

import torch
import triton  # noqa: TID253
import triton.language as tl  # noqa: TID253
from torch import Tensor

from kpt_lightning.kernels.quantize import empty_outputs
from kpt_lightning.kernels.quantize_triton import (
    in_words,
    is_ragged,
    magnitude_bits,
    scale_from_bits,
    scale_of_nothing,
    store_both,
    tile_start,
)


@dataclass(frozen=True, slots=True)
class RowLaunch:
    """Launch of a kernel whose programs hold whole rows and loop over them.

    Attributes:
        elements: Least elements of a block; a block of short rows holds several.
        elements_per_thread: From which the number of warps follows, 1 to 16.
        programs_per_sm: Programs of the grid per multiprocessor.
        num_stages: Loads in flight of the loop.
    """

    elements: int = 2048
    elements_per_thread: int = 8
    programs_per_sm: int = 4
    num_stages: int = 1


@dataclass(frozen=True, slots=True)
class TileLaunch:
    """Launch of a kernel whose programs each do one tile.

    Attributes:
        rows: Rows of a tile.
        columns: Columns of a tile.
        num_warps: Warps of a program.
    """

    rows: int = 128
    columns: int = 64
    num_warps: int = 8


# On one H200: benchmarks/results/kernels_nvidia-h200_2026-11-23.md.
FORWARD = RowLaunch(programs_per_sm=6)
# First guesses, not measured.
STATISTICS = RowLaunch()
BACKWARD = RowLaunch()
CAST = TileLaunch(rows=64, columns=64, num_warps=4)
PARTIALS = TileLaunch(rows=64, columns=32, num_warps=4)

_TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: None}


@triton.jit  # type: ignore[untyped-decorator]
def _round(value: tl.tensor, ROUND_TO: tl.constexpr) -> tl.tensor:
    if ROUND_TO is not None:
        value = value.to(ROUND_TO).to(tl.float32)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _rstd(x: tl.tensor, eps: tl.tensor, K: tl.constexpr) -> tl.tensor:
    return tl.rsqrt(tl.sum(x * x, axis=1) / K + eps)


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(
    x_pointer: tl.tensor, residual_pointer: tl.tensor, weight_pointer: tl.tensor, y_pointer: tl.tensor,
    summed_pointer: tl.tensor, rstd_pointer: tl.tensor, rows: tl.tensor, x_stride: tl.tensor,
    residual_stride: tl.tensor, eps: tl.tensor, offset: tl.tensor, K: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, ROUND_TO: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.arange(0, BLOCK_K)
    weight = tl.load(weight_pointer + column, mask=column < K, other=0.0).to(tl.float32) + offset
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < K)[None, :]
        dense = row[:, None] * K + column[None, :]
        x = tl.load(x_pointer + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if residual_pointer is not None:
            residual = tl.load(
                residual_pointer + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0
            )
            # The norm is that of the sum as the next layer will read it.
            summed = (x + residual.to(tl.float32)).to(summed_pointer.dtype.element_ty)
            tl.store(summed_pointer + dense, summed, mask=mask)
            x = summed.to(tl.float32)
        rstd = _rstd(x, eps, K)
        tl.store(rstd_pointer + row, rstd, mask=row < rows)
        y = _round(x * rstd[:, None], ROUND_TO) * weight[None, :]
        tl.store(y_pointer + dense, y.to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _statistics_kernel(
    x_pointer: tl.tensor, weight_pointer: tl.tensor, rstd_pointer: tl.tensor, amax_pointer: tl.tensor, rows: tl.tensor,
    x_stride: tl.tensor, eps: tl.tensor, offset: tl.tensor, K: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, ROUND_TO: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.arange(0, BLOCK_K)
    weight = tl.load(weight_pointer + column, mask=column < K, other=0.0).to(tl.float32) + offset
    largest = tl.zeros((BLOCK_ROWS, BLOCK_K), tl.int32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < K)[None, :]
        x = tl.load(x_pointer + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = _rstd(x, eps, K)
        tl.store(rstd_pointer + row, rstd, mask=row < rows)
        y = _round(x * rstd[:, None], ROUND_TO) * weight[None, :]
        # Where eps is 0, rstd of a row that is not there is infinite.
        largest = tl.maximum(largest, tl.where(mask, magnitude_bits(y), 0))
    tl.atomic_max(amax_pointer, tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _cast_kernel(
    x_pointer: tl.tensor, weight_pointer: tl.tensor, rstd_pointer: tl.tensor, amax: tl.tensor, y_rows: tl.tensor,
    y_columns: tl.tensor, inverse: tl.tensor, rows: tl.tensor, x_stride: tl.tensor, rows_stride: tl.tensor,
    columns_stride: tl.tensor, offset: tl.tensor, K: tl.constexpr, RAGGED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, ROUND_TO: tl.constexpr, LARGEST: tl.constexpr,
) -> None:  # fmt: skip
    # From the end, which the statistics read last and L2 may still hold.
    first_row, first_column = tile_start(K, True, BLOCK_ROWS, BLOCK_COLUMNS)
    row, column = first_row + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < K)[None, :]
    scale = scale_from_bits(amax, LARGEST)
    if tl.program_id(0) == 0:
        tl.store(inverse, tl.div_rn(1.0, scale))
    place = x_pointer + row[:, None].to(tl.int64) * x_stride + column[None, :]
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_pointer + row, mask=row < rows, other=0.0)
    weight = tl.load(weight_pointer + column, mask=column < K, other=0.0).to(tl.float32) + offset
    y = _round(x * rstd[:, None], ROUND_TO) * weight[None, :]
    store_both(
        y, scale, y_rows, y_columns, first_row, first_column, rows, K, rows_stride, columns_stride,
        RAGGED, True, True, LARGEST,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(
    grad_pointer: tl.tensor, grad_summed_pointer: tl.tensor, x_pointer: tl.tensor, weight_pointer: tl.tensor,
    rstd_pointer: tl.tensor, grad_x_pointer: tl.tensor, partial_pointer: tl.tensor, rows: tl.tensor,
    grad_stride: tl.tensor, grad_summed_stride: tl.tensor, x_stride: tl.tensor, offset: tl.tensor, K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ROUND_TO: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.arange(0, BLOCK_K)
    weight = tl.load(weight_pointer + column, mask=column < K, other=0.0).to(tl.float32) + offset
    partial = tl.zeros((BLOCK_ROWS, BLOCK_K), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < K)[None, :]
        grad = tl.load(grad_pointer + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        x = tl.load(x_pointer + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_pointer + row, mask=row < rows, other=0.0)[:, None]
        normalized = x * rstd
        weighted = grad * weight[None, :]
        projection = tl.sum(weighted * normalized, axis=1)[:, None] / K
        grad_x = (weighted - normalized * projection) * rstd
        if grad_summed_pointer is not None:
            summed = row[:, None] * grad_summed_stride + column[None, :]
            grad_x += tl.load(grad_summed_pointer + summed, mask=mask, other=0.0).to(tl.float32)
        dense = row[:, None] * K + column[None, :]
        tl.store(grad_x_pointer + dense, grad_x.to(grad_x_pointer.dtype.element_ty), mask=mask)
        partial += grad * _round(normalized, ROUND_TO)
    tl.store(partial_pointer + tl.program_id(0) * K + column, tl.sum(partial, axis=0), mask=column < K)


@triton.jit  # type: ignore[untyped-decorator]
def _partials_kernel(
    partial_pointer: tl.tensor, grad_weight_pointer: tl.tensor, partials: tl.tensor, K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_ROWS, BLOCK_K), tl.float32)
    for start in tl.range(0, partials, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < partials)[:, None] & (column < K)[None, :]
        total += tl.load(partial_pointer + row[:, None] * K + column[None, :], mask=mask, other=0.0)
    value = tl.sum(total, axis=0).to(grad_weight_pointer.dtype.element_ty)
    tl.store(grad_weight_pointer + column, value, mask=column < K)


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
    config: RowLaunch = FORWARD,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``y``, the sum where there is a residual, and 1 / root mean square of each row.

    Args:
        x: (M, K) fp32, bf16 or fp16.
        residual: As ``x``, of any of these dtypes, or None.
        weight: (K,).
        eps: Added to the mean square.
        offset: Added to the weight.
        round_first: Round the normalized value to the dtype of what was normalized.
        out_dtype: dtype of ``y``.
        config: Launch configuration.
    """
    x, weight = _unit_stride(x), weight.contiguous()
    rows, k = x.shape
    y = torch.empty((rows, k), dtype=out_dtype, device=x.device)
    rstd = torch.empty((rows,), dtype=torch.float32, device=x.device)
    summed, normed = None, x.dtype
    if residual is not None:
        residual, normed = _unit_stride(residual), torch.promote_types(x.dtype, residual.dtype)
        summed = torch.empty((rows, k), dtype=normed, device=x.device)
    if rows:
        programs, block = _rows_grid(rows, k, x.device, config)
        _forward_kernel[(programs,)](
            x, residual, weight, y, summed, rstd,
            rows, x.stride(0), 0 if residual is None else residual.stride(0), eps, offset,
            K=k, ROUND_TO=_TRITON_DTYPE[normed] if round_first else None, **block,
        )  # fmt: skip
    return y, summed, rstd


def launch_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    round_first: bool,
    dtype: torch.dtype,
    statistics: RowLaunch = STATISTICS,
    cast: TileLaunch = CAST,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y`` in FP8 as (M, K) and as (K, M), the scale that multiplies it, and 1 / root mean square of each row.

    Args:
        x: (M, K) fp32, bf16 or fp16.
        weight: (K,).
        eps: Added to the mean square.
        offset: Added to the weight.
        round_first: Round the normalized value to the dtype of ``x``.
        dtype: FP8 dtype.
        statistics: Launch configuration of the first kernel.
        cast: Launch configuration of the second one.
    """
    x, weight = _unit_stride(x), weight.contiguous()
    rows, k = x.shape
    y_rows, y_columns, scale = empty_outputs(x, rows, k, dtype)
    rstd = torch.empty((rows,), dtype=torch.float32, device=x.device)
    if not rows:
        return y_rows, y_columns, scale_of_nothing(x, dtype), rstd
    amax = torch.zeros((), dtype=torch.int32, device=x.device)
    round_to = _TRITON_DTYPE[x.dtype] if round_first else None
    programs, block = _rows_grid(rows, k, x.device, statistics)
    _statistics_kernel[(programs,)](
        x, weight, rstd, amax, rows, x.stride(0), eps, offset, K=k, ROUND_TO=round_to, **block
    )  # fmt: skip
    with in_words(y_rows) as in_rows, in_words(y_columns) as in_columns:
        _cast_kernel[(triton.cdiv(rows, cast.rows) * triton.cdiv(k, cast.columns),)](
            x, weight, rstd, amax, in_rows, in_columns, scale, rows, x.stride(0), in_rows.stride(0),
            in_columns.stride(0), offset,
            K=k, RAGGED=is_ragged(rows, k), BLOCK_ROWS=cast.rows, BLOCK_COLUMNS=cast.columns, ROUND_TO=round_to,
            LARGEST=torch.finfo(dtype).max, num_warps=cast.num_warps,
        )  # fmt: skip
    return y_rows, y_columns, scale, rstd


def launch_backward(
    grad: Tensor,
    grad_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    round_first: bool,
    config: RowLaunch = BACKWARD,
    partials: TileLaunch = PARTIALS,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``, the latter summed in an order that depends on the shape and the GPU only.

    Args:
        grad: (M, K) gradient of ``y``.
        grad_summed: (M, K) added to the gradient of ``x``, or None.
        x: (M, K) what was normalized.
        weight: (K,).
        rstd: (M,) fp32 of the forward pass.
        offset: Added to the weight.
        round_first: As in the forward pass.
        config: Launch configuration of the first kernel.
        partials: Launch configuration of the sum of the partial weight gradients.
    """
    grad, x, weight, rstd = _unit_stride(grad), _unit_stride(x), weight.contiguous(), rstd.contiguous()
    grad_summed = None if grad_summed is None else _unit_stride(grad_summed)
    rows, k = x.shape
    grad_x = torch.empty((rows, k), dtype=x.dtype, device=x.device)
    if not rows:
        return grad_x, torch.zeros_like(weight)
    grad_weight = torch.empty((k,), dtype=weight.dtype, device=x.device)
    programs, block = _rows_grid(rows, k, x.device, config)
    partial = torch.empty((programs, k), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        grad, grad_summed, x, weight, rstd, grad_x, partial,
        rows, grad.stride(0), 0 if grad_summed is None else grad_summed.stride(0), x.stride(0), offset,
        K=k, ROUND_TO=_TRITON_DTYPE[x.dtype] if round_first else None, **block,
    )  # fmt: skip
    _partials_kernel[(triton.cdiv(k, partials.columns),)](
        partial, grad_weight, programs,
        K=k, BLOCK_ROWS=partials.rows, BLOCK_K=partials.columns, num_warps=partials.num_warps,
    )  # fmt: skip
    return grad_x, grad_weight


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_grid(rows: int, k: int, device: torch.device, config: RowLaunch) -> tuple[int, dict[str, int]]:
    """Number of programs, and the shape of a block with the warps for it."""
    block_k = triton.next_power_of_2(k)
    block_rows = max(1, config.elements // block_k)
    warps = min(16, max(1, block_rows * block_k // (32 * config.elements_per_thread)))
    # The interpreter runs one program after another.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs = min(triton.cdiv(rows, block_rows), processors * config.programs_per_sm)
    shape = {"BLOCK_ROWS": block_rows, "BLOCK_K": block_k, "STAGES": config.num_stages, "num_warps": warps}
    return programs, shape
