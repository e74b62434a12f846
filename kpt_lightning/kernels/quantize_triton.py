"""Triton kernels of the cast to FP8 in both layouts, and the pieces that every kernel that writes FP8 shares."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton  # noqa: TID253
import triton.language as tl  # noqa: TID253
from torch import Tensor

from kpt_lightning.kernels.quantize import TINY_AMAX, Quantized, empty_outputs, joined_shape, scale_of


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes of the launches; all but ``programs_per_sm`` powers of two.

    Attributes:
        amax_rows: Height of the tile that a program of the amax kernel reads in one turn.
        amax_columns: Its width, at most; contiguous elements of a read.
        amax_warps: Warps of that program.
        programs_per_sm: Of the amax kernel, whose programs walk down a strip of tiles.
        cast_rows: Height of the tile that a program of the cast kernel reads; contiguous bytes of a transposed store.
        cast_columns: Its width; contiguous bytes of a store in rows.
        cast_warps: Warps of that program.
        last_first: Cast from the end, the part that the amax kernel read last and that L2 may still hold.
    """

    amax_rows: int
    amax_columns: int
    amax_warps: int
    programs_per_sm: int
    cast_rows: int
    cast_columns: int
    cast_warps: int
    last_first: bool


# On one H200: benchmarks/results/kernels_nvidia-h200_2026-11-23.md.
CONFIG = Config(
    amax_rows=8, amax_columns=1024, amax_warps=4, programs_per_sm=4,
    cast_rows=64, cast_columns=64, cast_warps=4, last_first=True,
)  # fmt: skip

_TINY_AMAX = tl.constexpr(TINY_AMAX)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit  # type: ignore[untyped-decorator]
def magnitude_bits(value: tl.tensor) -> Any:
    """|value| as the bits of fp32, which order like the numbers; NaN is above infinity and so is never lost."""
    return value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit  # type: ignore[untyped-decorator]
def larger(largest: tl.tensor, value: tl.tensor) -> Any:
    """Elementwise maximum of magnitudes, NaN above all."""
    return tl.maximum(largest, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator]
def store_amax(amax: tl.tensor, largest: tl.tensor) -> None:
    """Raise ``amax``, the bits of an fp32, to the maximum of a 2D tile; no order of arrival changes the result."""
    tl.atomic_max(amax, tl.max(tl.max(magnitude_bits(largest), axis=1), axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def scale_from_bits(amax: tl.tensor, LARGEST: tl.constexpr) -> Any:
    """The scale of quantize.py::scale_of, rounded as PyTorch does: a reciprocal, then a product."""
    largest = tl.load(amax).to(tl.float32, bitcast=True)
    return tl.div_rn(1.0, tl.maximum(largest, _TINY_AMAX, propagate_nan=tl.PropagateNan.ALL)) * LARGEST


@triton.jit  # type: ignore[untyped-decorator]
def _rounded_for_interpreter(value: tl.tensor, dtype: tl.constexpr, LARGEST: tl.constexpr) -> Any:
    """Clamp and round in fp32: the interpreter's own cast halves what rounds up to a power of two, and loses NaN."""
    value = tl.maximum(value, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    value = tl.minimum(value, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    STEP: tl.constexpr = 0.125 if dtype == tl.float8e4nv else 0.25
    SUBNORMAL: tl.constexpr = 2.0**-9 if dtype == tl.float8e4nv else 2.0**-16
    NAN: tl.constexpr = 0x7FF00000 if dtype == tl.float8e4nv else 0x7FE00000
    power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    spacing = tl.maximum(power * STEP, SUBNORMAL)
    # fp32 of this size has no fraction: adding rounds to nearest even.
    rounded = (value / spacing + 12582912.0 - 12582912.0) * spacing
    signed = (rounded.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (value.to(tl.int32, bitcast=True) & -0x80000000)
    return tl.where(value == value, signed, NAN).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def store_both(
    value: tl.tensor, scale: tl.tensor, rows: tl.tensor, columns: tl.tensor, first_row: tl.tensor,
    first_column: tl.tensor, height: tl.tensor, width: tl.tensor, rows_stride: tl.tensor, columns_stride: tl.tensor,
    RAGGED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr,
) -> None:  # fmt: skip
    """Cast a tile at (first_row, first_column) of a (height, width) tensor and store it, and its transpose.

    Both are written in words of four, into memory of :func:`in_words`: a tile of bytes comes out wrong of Triton 3.6
    where it is stored in two layouts (https://github.com/triton-lang/triton/issues/11111), and takes more instructions.
    RAGGED: height or width is no multiple of 4. What the compiler knows to be one, it moves 16 bytes at a time.
    """
    words = tl.zeros((value.shape[0], value.shape[1] // 4), tl.uint32)
    # One turn. Past a loop of this kind Triton's compiler hands words from layout to layout, as it should; without one
    # it computes the whole tile again in each layout, which were twice the instructions.
    turn = 0
    while turn < 1:
        words = _four_in_a_word(value * scale, rows.dtype.element_ty, LARGEST)
        turn += 1
    if ROWS:
        row = first_row + tl.arange(0, value.shape[0])[:, None]
        quarter = first_column // 4 + tl.arange(0, value.shape[1] // 4)[None, :]
        place = rows.to(tl.pointer_type(tl.uint32), bitcast=True) + row.to(tl.int64) * (rows_stride // 4) + quarter
        across = tl.cdiv(width, 4) if RAGGED else width // 4
        tl.store(place, words, mask=(row < height) & (quarter < across))
    if COLUMNS:
        quarter = first_row // 4 + tl.arange(0, value.shape[0] // 4)[None, :]
        down = tl.cdiv(height, 4) if RAGGED else height // 4
        column = first_column + 4 * tl.arange(0, value.shape[1] // 4)[:, None]
        place = columns.to(tl.pointer_type(tl.uint32), bitcast=True) + quarter
        # (C / 4, R) to four times (C / 4, R / 4).
        turned = tl.trans(words)
        even, odd = tl.split(tl.reshape(turned, (turned.shape[0], turned.shape[1] // 4, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        turned = _bytes_turned(first, second, third, fourth)
        for byte in tl.static_range(4):
            there = (column + byte).to(tl.int64) * (columns_stride // 4)
            tl.store(place + there, turned[byte], mask=(column + byte < width) & (quarter < down))


@triton.jit  # type: ignore[untyped-decorator]
def _bytes_turned(first: tl.tensor, second: tl.tensor, third: tl.tensor, fourth: tl.tensor) -> Any:
    """Four words of the lowest, second, third and highest bytes of four words: 4 x 4 bytes transposed."""
    if INTERPRETED:
        return (
            _byte_of_each(first, second, third, fourth, 0), _byte_of_each(first, second, third, fourth, 1),
            _byte_of_each(first, second, third, fourth, 2), _byte_of_each(first, second, third, fourth, 3),
        )  # fmt: skip
    # Two instructions a word; from shifts and masks the compiler makes eight.
    return tl.inline_asm_elementwise(
        "{\n.reg .b32 low12, low34, high12, high34;\n"
        "prmt.b32 low12, $4, $5, 0x5140;\nprmt.b32 low34, $6, $7, 0x5140;\n"
        "prmt.b32 high12, $4, $5, 0x7362;\nprmt.b32 high34, $6, $7, 0x7362;\n"
        "prmt.b32 $0, low12, low34, 0x5410;\nprmt.b32 $1, low12, low34, 0x7632;\n"
        "prmt.b32 $2, high12, high34, 0x5410;\nprmt.b32 $3, high12, high34, 0x7632;\n}",
        "=&r,=&r,=&r,=&r,r,r,r,r", [first, second, third, fourth],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _byte_of_each(
    first: tl.tensor, second: tl.tensor, third: tl.tensor, fourth: tl.tensor, BYTE: tl.constexpr
) -> Any:  # fmt: skip
    shift: tl.constexpr = 8 * BYTE
    return (
        ((first >> shift) & 0xFF) | (((second >> shift) & 0xFF) << 8)
        | (((third >> shift) & 0xFF) << 16) | (((fourth >> shift) & 0xFF) << 24)
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _four_in_a_word(scaled: tl.tensor, dtype: tl.constexpr, LARGEST: tl.constexpr) -> Any:
    """(R, C) fp32 to (R, C / 4) words of four FP8 values, the first column lowest; finite values clamped, NaN kept.

    Source: "cvt" with ".satfinite" in https://docs.nvidia.com/cuda/parallel-thread-execution/.
    """
    even, odd = tl.split(tl.reshape(scaled, (scaled.shape[0], scaled.shape[1] // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    if INTERPRETED:
        first, second = _bits(first, dtype, LARGEST), _bits(second, dtype, LARGEST)
        third, fourth = _bits(third, dtype, LARGEST), _bits(fourth, dtype, LARGEST)
        return first | (second << 8) | (third << 16) | (fourth << 24)
    # An operation of its own: the compiler would take the change of layout back to the bytes.
    NAME: tl.constexpr = "e4m3x2" if dtype == tl.float8e4nv else "e5m2x2"
    return tl.inline_asm_elementwise(
        "{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite." + NAME + ".f32 low, $2, $1;\n"
        "cvt.rn.satfinite." + NAME + ".f32 high, $4, $3;\n"
        "mov.b32 $0, {low, high};\n}",
        "=r,r,r,r,r", [first, second, third, fourth], dtype=tl.uint32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def to_float8(scaled: tl.tensor, dtype: tl.constexpr, LARGEST: tl.constexpr) -> Any:
    """Finite values clamped, NaN kept; for values that are stored in one layout."""
    if INTERPRETED:
        return _rounded_for_interpreter(scaled, dtype, LARGEST).to(dtype)
    scaled = tl.maximum(scaled, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(scaled, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _bits(scaled: tl.tensor, dtype: tl.constexpr, LARGEST: tl.constexpr) -> Any:
    return to_float8(scaled, dtype, LARGEST).to(tl.uint8, bitcast=True).to(tl.uint32)


@triton.jit  # type: ignore[untyped-decorator]
def tile_start(
    width: tl.tensor, LAST_FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
) -> Any:
    """First row and column of this program's tile; tiles of one row of tiles follow each other."""
    tile = tl.program_id(0)
    if LAST_FIRST:
        tile = tl.num_programs(0) - 1 - tile
    across = tl.cdiv(width, BLOCK_COLUMNS)
    return (tile // across) * BLOCK_ROWS, (tile % across) * BLOCK_COLUMNS


@triton.jit  # type: ignore[untyped-decorator]
def strip_indices(width: tl.tensor, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr) -> Any:
    """First row of this program's strip, the distance to the next, and its columns."""
    across = tl.cdiv(width, BLOCK_COLUMNS)
    column = (tl.program_id(0) % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return (tl.program_id(0) // across) * BLOCK_ROWS, (tl.num_programs(0) // across) * BLOCK_ROWS, column


@triton.jit  # type: ignore[untyped-decorator]
def _amax_kernel(
    x: tl.tensor, amax: tl.tensor, height: tl.tensor, width: tl.tensor, stride: tl.tensor, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    first, step, column = strip_indices(width, BLOCK_ROWS, BLOCK_COLUMNS)
    largest = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    while first < height:
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < height)[:, None] & (column < width)[None, :]
        value = tl.load(x + row[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0.0)
        largest = larger(largest, value.to(tl.float32))
        first += step
    store_amax(amax, largest)


@triton.jit  # type: ignore[untyped-decorator]
def _cast_kernel(
    x: tl.tensor, amax: tl.tensor, rows: tl.tensor, columns: tl.tensor, inverse: tl.tensor, height: tl.tensor,
    width: tl.tensor, stride: tl.tensor, rows_stride: tl.tensor, columns_stride: tl.tensor, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr, LAST_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    first_row, first_column = tile_start(width, LAST_FIRST, BLOCK_ROWS, BLOCK_COLUMNS)
    row, column = first_row + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < height)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = scale_from_bits(amax, LARGEST)
    if tl.program_id(0) == 0:
        tl.store(inverse, tl.div_rn(1.0, scale))
    store_both(
        value, scale, rows, columns, first_row, first_column, height, width, rows_stride, columns_stride, RAGGED, ROWS,
        COLUMNS, LARGEST,
    )  # fmt: skip


def quantize(
    parts: Sequence[Tensor], dtype: torch.dtype, dim: int, rows: bool, columns: bool, config: Config = CONFIG
) -> Quantized:
    """``quantize_many`` by the kernels.

    Args:
        parts: As in quantize.py::quantize_many, on CUDA (on a CPU under Triton's interpreter), as are all but the last.
        dtype: FP8.
        dim: 0 or 1.
        rows: Whether to write the layout of the parts.
        columns: Whether to write the transpose.
        config: Sizes of the launches.

    Returns:
        As quantize_many.
    """
    height, width = joined_shape(parts, dim)
    written = empty_outputs(parts[0], height, width, dtype, rows, columns)
    if height * width == 0:
        return *written[:2], scale_of_nothing(parts[0], dtype)
    readable = [part if part.stride(1) == 1 else part.contiguous() for part in parts if part.numel()]
    amax = torch.zeros(1, dtype=torch.int32, device=parts[0].device)
    for part in readable:
        _launch_amax(part, amax, config)
    start = 0
    for part in readable:
        size = part.shape[dim]
        in_rows = written[0].narrow(dim, start, size) if rows else written[0]
        in_columns = written[1].narrow(1 - dim, start, size) if columns else written[1]
        with in_words(in_rows) as row_memory, in_words(in_columns) as column_memory:
            _launch_cast(part, amax, (row_memory, column_memory, written[2]), rows, columns, config)
        start += size
    return written


def is_ragged(height: int, width: int) -> bool:
    """Whether a layout of a (height, width) tensor does not end with a word of four."""
    return bool(height % 4 or width % 4)


@contextmanager
def in_words(layout: Tensor) -> Iterator[Tensor]:
    """Memory to write one layout to in words of four: itself where that fits, else what is copied to it afterwards."""
    size = layout.shape[-1]
    if size % 4 == 0 and (size == 0 or (layout.stride(0) % 4 == 0 and layout.data_ptr() % 4 == 0)):
        yield layout
        return
    wider = torch.empty((layout.shape[0], size + -size % 4), dtype=layout.dtype, device=layout.device)
    yield wider
    layout.copy_(wider[:, :size])


@lru_cache(maxsize=4096)
def plan_amax(height: int, width: int, device: torch.device, config: Config) -> tuple[tuple[int], dict[str, int]]:
    """Grid and constants of a kernel that walks down strips of a (height, width) tensor; asked at every launch."""
    columns = min(config.amax_columns, triton.next_power_of_2(width))
    across = triton.cdiv(width, columns)
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    strips = min(triton.cdiv(height, config.amax_rows), max(1, sms * config.programs_per_sm // across))
    constants = {"BLOCK_ROWS": config.amax_rows, "BLOCK_COLUMNS": columns, "num_warps": config.amax_warps}
    return (across * strips,), constants


@lru_cache(maxsize=4096)
def plan_cast(height: int, width: int, dtype: torch.dtype, config: Config) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of a kernel that writes a (height, width) tensor in tiles."""
    tiles = triton.cdiv(height, config.cast_rows) * triton.cdiv(width, config.cast_columns)
    return (tiles,), {
        "LARGEST": torch.finfo(dtype).max, "LAST_FIRST": config.last_first, "BLOCK_ROWS": config.cast_rows,
        "BLOCK_COLUMNS": config.cast_columns, "num_warps": config.cast_warps,
    }  # fmt: skip


def scale_of_nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of a tensor without elements."""
    return scale_of(torch.zeros((), device=like.device), dtype).reciprocal()


def _launch_amax(x: Tensor, amax: Tensor, config: Config) -> None:
    height, width = x.shape
    grid, constants = plan_amax(height, width, x.device, config)
    _amax_kernel[grid](x, amax, height, width, x.stride(0), **constants)


def _launch_cast(x: Tensor, amax: Tensor, written: Quantized, rows: bool, columns: bool, config: Config) -> None:
    height, width = x.shape
    grid, constants = plan_cast(height, width, written[0].dtype, config)
    _cast_kernel[grid](
        x, amax, *written, height, width, x.stride(0), written[0].stride(0), written[1].stride(0),
        RAGGED=is_ragged(height, width), ROWS=rows, COLUMNS=columns, **constants,
    )  # fmt: skip
