"""Triton kernels of the cross entropy of rows of logits: loss, gradient, and gradient in FP8 in two layouts."""

import math
from dataclasses import dataclass

import torch
import triton  # noqa: TID253  only CUDA implementations import this module
import triton.language as tl  # noqa: TID253
from torch import Tensor

from kpt_lightning.kernels.quantize_triton import INTERPRETED, in_words, is_ragged, store_both, tile_start, to_float8


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How a kernel is launched.

    Attributes:
        rows: Rows of logits that one program takes at a time.
        columns: Columns, likewise.
        num_warps: Warps of a program.
        num_stages: Loads in flight in a loop.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


_LOG2_E = tl.constexpr(math.log2(math.e))
_LABELS = 64
"""Rows that one program of the second kernel takes: 64 programs for 4096."""

# On one H200: benchmarks/results/kernels_nvidia-h200_2026-11-23.md.
ROWS_CONFIG = LaunchConfig(rows=1, columns=16384, num_warps=8, num_stages=1)
QUANTIZE_CONFIG = LaunchConfig(rows=128, columns=128, num_warps=4, num_stages=1)
# First guess, not measured.
BACKWARD_CONFIG = LaunchConfig(rows=1, columns=8192, num_warps=8, num_stages=1)


@triton.jit  # type: ignore[untyped-decorator]
def _rows_kernel(
    logits: tl.tensor, labels: tl.tensor, loss: tl.tensor, logsumexp: tl.tensor, stride: tl.tensor,
    ignore_index: tl.tensor, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """One program per row; what was summed is rescaled where a block holds a new maximum (online softmax)."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    maximum = -float("inf")
    total = 0.0
    for first in tl.range(0, CLASSES, COLUMNS, num_stages=STAGES):
        place = first + tl.arange(0, COLUMNS)
        x = tl.load(start + place, mask=place < CLASSES, other=-float("inf")).to(tl.float32)
        new = tl.maximum(maximum, tl.max(x, axis=0))
        # Minus infinity less minus infinity would be NaN in a row that begins with masked classes.
        base = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(x - base), axis=0)
        maximum = new
    found = tl.log(total) + tl.where(maximum == -float("inf"), 0.0, maximum)
    label = tl.load(labels + row)
    known = (label >= 0) & (label < CLASSES)
    value = found - tl.load(start + tl.where(known, label, 0)).to(tl.float32)
    value = tl.where(label == ignore_index, 0.0, tl.where(known, value, float("nan")))
    tl.store(loss + row, value)
    tl.store(logsumexp + row, found)


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_minus_onehot(
    x: tl.tensor, logsumexp: tl.tensor, place: tl.tensor, label: tl.tensor, classes: tl.tensor, ignore_index: tl.tensor
) -> tl.tensor:
    """The gradient of one row's loss; 0 in ignored rows, NaN in rows whose label is no class."""
    value = tl.exp(x - logsumexp) - tl.where(place == label, 1.0, 0.0)
    value = tl.where((label >= 0) & (label < classes), value, float("nan"))
    return tl.where(label == ignore_index, 0.0, value)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(
    logits: tl.tensor, labels: tl.tensor, logsumexp: tl.tensor, grad: tl.tensor, classes: tl.tensor,
    stride: tl.tensor, ignore_index: tl.tensor, blocks: tl.tensor, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """One program per block of a row, neighbours in memory side by side."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    place = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < classes
    x = tl.load(logits + row * stride + place, mask=inside, other=0.0).to(tl.float32)
    value = _softmax_minus_onehot(
        x, tl.load(logsumexp + row), place, tl.load(labels + row), classes, ignore_index
    )  # fmt: skip
    tl.store(grad + row * classes + place, value.to(grad.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_quantize_kernel(
    logits: tl.tensor, labels: tl.tensor, logsumexp: tl.tensor, grad_rows: tl.tensor, grad_columns: tl.tensor,
    count: tl.tensor, classes: tl.tensor, width: tl.tensor, stride: tl.tensor, rows_stride: tl.tensor,
    columns_stride: tl.tensor, ignore_index: tl.tensor, LARGEST: tl.constexpr, LOG2_LARGEST: tl.constexpr,
    RAGGED: tl.constexpr, WHOLE: tl.constexpr, WITH_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """One program per tile of the softmax, written as it is and transposed; nothing is above 1, hence the scale.

    What limits it is instructions, not memory: the scale is in the exponent, ignored rows are in the mask of the load,
    and labels are left to :func:`_labels_kernel`. WHOLE: every tile is full of classes.
    """
    first_row, first_column = tile_start(width, False, ROWS, COLUMNS)
    row, place = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    inside = row < count
    label = tl.load(labels + row, mask=inside, other=ignore_index)
    used = inside & (label != ignore_index)
    # A label that is no class makes its row NaN, by the one number of the row.
    known = tl.load(logsumexp + row, mask=used, other=0.0)
    known = tl.where((label == ignore_index) | ((label >= 0) & (label < classes)), known, float("nan"))[:, None]
    real = used[:, None]
    if not WHOLE:
        real = real & (place < classes)[None, :]
    x = tl.load(logits + row[:, None].to(tl.int64) * stride + place[None, :], mask=real, other=-float("inf"))
    value = _exp2((x.to(tl.float32) - known) * _LOG2_E + LOG2_LARGEST)
    store_both(
        value, 1.0, grad_rows, grad_columns, first_row, first_column, count, width, rows_stride, columns_stride,
        RAGGED, True, WITH_COLUMNS, LARGEST,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _labels_kernel(
    logits: tl.tensor, labels: tl.tensor, logsumexp: tl.tensor, grad_rows: tl.tensor, grad_columns: tl.tensor,
    count: tl.tensor, classes: tl.tensor, stride: tl.tensor, rows_stride: tl.tensor, columns_stride: tl.tensor,
    ignore_index: tl.tensor, LARGEST: tl.constexpr, WITH_COLUMNS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """The one class of a row whose gradient is softmax minus 1, over what the other kernel wrote there."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    label = tl.load(labels + row, mask=row < count, other=ignore_index)
    real = (label != ignore_index) & (label >= 0) & (label < classes)
    x = tl.load(logits + row * stride + label, mask=real, other=0.0).to(tl.float32)
    value = tl.exp(x - tl.load(logsumexp + row, mask=real, other=0.0)) - 1.0
    value = to_float8(value * LARGEST, grad_rows.dtype.element_ty, LARGEST)
    tl.store(grad_rows + row * rows_stride + label, value, mask=real)
    if WITH_COLUMNS:
        tl.store(grad_columns + label * columns_stride + row, value, mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _exp2(value: tl.tensor) -> tl.tensor:
    """A power of two, 0 where it is below 2^-126, which no FP8 has: one instruction instead of four."""
    if INTERPRETED:
        return tl.exp2(value)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


def launch_rows(
    logits: Tensor, labels: Tensor, ignore_index: int, config: LaunchConfig = ROWS_CONFIG
) -> tuple[Tensor, Tensor]:
    """Loss and logsumexp of each row, as :func:`kpt_lightning.kernels.cross_entropy.cross_entropy_rows`."""
    count, classes = logits.shape
    loss = torch.empty(count, dtype=torch.float32, device=logits.device)
    logsumexp = torch.empty(count, dtype=torch.float32, device=logits.device)
    if count:
        _rows_kernel[(count,)](
            logits, labels, loss, logsumexp, logits.stride(0), ignore_index,
            CLASSES=classes, COLUMNS=_block(classes, config.columns), STAGES=config.num_stages,
            num_warps=config.num_warps,
        )  # fmt: skip
    return loss, logsumexp


def launch_backward(
    logits: Tensor, labels: Tensor, logsumexp: Tensor, ignore_index: int, config: LaunchConfig = BACKWARD_CONFIG
) -> Tensor:
    """Softmax minus one-hot, as :func:`kpt_lightning.kernels.cross_entropy.cross_entropy_backward`."""
    count, classes = logits.shape
    grad = torch.empty((count, classes), dtype=logits.dtype, device=logits.device)
    columns = _block(classes, config.columns)
    blocks = triton.cdiv(classes, columns)
    if count:
        _backward_kernel[(count * blocks,)](
            logits, labels, logsumexp, grad, classes, logits.stride(0), ignore_index, blocks,
            COLUMNS=columns, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return grad


def launch_backward_quantize(
    logits: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    dtype: torch.dtype,
    width: int,
    columns: Tensor | None,
    offset: int,
    ignore_index: int,
    config: LaunchConfig = QUANTIZE_CONFIG,
) -> Tensor:
    """The same in FP8, as :func:`kpt_lightning.kernels.cross_entropy.cross_entropy_backward_quantize`."""
    count, classes = logits.shape
    rows = torch.empty((count, width), dtype=dtype, device=logits.device)
    largest = torch.finfo(dtype).max
    if count:
        tiles = triton.cdiv(width, config.columns) * triton.cdiv(count, config.rows)
        part = rows.new_empty((0, 4)) if columns is None else columns[:, offset : offset + count]
        with in_words(rows) as in_rows, in_words(part) as in_columns:
            _backward_quantize_kernel[(tiles,)](
                logits, labels, logsumexp, in_rows, in_columns,
                count, classes, width, logits.stride(0), in_rows.stride(0), in_columns.stride(0), ignore_index,
                LARGEST=largest, LOG2_LARGEST=math.log2(largest), RAGGED=is_ragged(count, width),
                WHOLE=width == classes and classes % config.columns == 0, WITH_COLUMNS=columns is not None,
                ROWS=config.rows, COLUMNS=config.columns, num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            _labels_kernel[(triton.cdiv(count, _LABELS),)](
                logits, labels, logsumexp, in_rows, in_columns, count, classes, logits.stride(0), in_rows.stride(0),
                in_columns.stride(0), ignore_index, LARGEST=largest, WITH_COLUMNS=columns is not None, ROWS=_LABELS,
                num_warps=2,
            )  # fmt: skip
    return rows


def _block(classes: int, largest: int) -> int:
    return int(min(largest, triton.next_power_of_2(classes)))
