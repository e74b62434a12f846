"""Output head and cross entropy together with FP8 GEMMs, a chunk of rows at a time."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kpt_lightning.kernels.cross_entropy import (
    IGNORED,
    cross_entropy_backward,
    cross_entropy_backward_quantize,
    cross_entropy_rows,
)
from kpt_lightning.kernels.linear_cross_entropy import (
    Found,
    Reduction,
    Wanted,
    accumulate,
    chunk_size,
    loss_divisor,
    scaled_loss,
)
from kpt_lightning.kernels.quantize import quantize
from kpt_lightning.precision.float8_linear import ALIGNMENT
from kpt_lightning.precision.gemm import float8_gemm
from kpt_lightning.precision.recipes import E4M3, E5M2

GradWeight = Literal["fp8", "bf16"]

_LOGITS = torch.bfloat16


def float8_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORED,
    reduction: Reduction = "mean",
    num_items: Tensor | int | None = None,
    chunk_rows: int | None = None,
    grad_weight: GradWeight = "fp8",
    emulate: bool = False,
) -> Tensor:
    """As :func:`kpt_lightning.kernels.linear_cross_entropy.linear_cross_entropy` with FP8 GEMMs, and without a bias.

    Hidden states and weight are cast to e4m3 once, each with one scale; logits are bf16; their gradient is cast to e5m2
    with the scale that its bound of 1 gives. Sizes that are no multiple of 16 are padded with zeros.

    Args:
        hidden: (N, H), float dtype; under autocast it is rounded to the autocast dtype first.
        weight: (V, H), the master weight, fp32, bf16 or fp16.
        labels: (N,), int64.
        ignore_index: As there.
        reduction: As there.
        num_items: As there.
        chunk_rows: As there; rounded up to a multiple of 16.
        grad_weight: The GEMM of the weight's gradient: "fp8", which keeps the gradients of all logits in FP8 for one
            GEMM at the end, N x V bytes; or "bf16", summed over chunks in fp32.
        emulate: Multiply in fp32 instead of ``torch._scaled_mm``.

    Returns:
        fp32 scalar.

    Raises:
        ValueError: Shapes, reduction, chunk_rows or grad_weight do not fit.
    """
    if grad_weight not in ("fp8", "bf16"):
        raise ValueError(f"grad_weight={grad_weight!r} is neither 'fp8' nor 'bf16'")
    divisor = loss_divisor(hidden, weight, labels, ignore_index, reduction, num_items)
    rows = chunk_size(len(hidden), len(weight), chunk_rows)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    settings = _Settings(rows + -rows % ALIGNMENT, ignore_index, grad_weight, emulate)

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, wanted: Wanted) -> Found:
        return _compute(hidden.to(dtype), weight, labels, wanted, settings)

    return scaled_loss(hidden, weight, None, labels, divisor, compute)


@dataclass(frozen=True, slots=True)
class _Settings:
    chunk_rows: int
    ignore_index: int
    grad_weight: GradWeight
    emulate: bool


@dataclass(frozen=True, slots=True)
class _Operands:
    """Padded: N rows, H features, W classes.

    Attributes:
        hidden: (N, H), the compute dtype.
        hidden_rows: (N, H), e4m3.
        hidden_scale: Its scale.
        weight_rows: (W, H), e4m3.
        weight_columns: (H, W), likewise.
        weight_scale: Its scale.
        labels: (N,).
        classes: Those of W that are no padding.
        grad_columns: (W, N), e5m2, to be written; None where the weight's gradient is not made in FP8.
    """

    hidden: Tensor
    hidden_rows: Tensor
    hidden_scale: Tensor
    weight_rows: Tensor
    weight_columns: Tensor
    weight_scale: Tensor
    labels: Tensor
    classes: int
    grad_columns: Tensor | None


@dataclass(slots=True)
class _Sums:
    """What the chunks add up to."""

    losses: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    weight: Tensor | None = None


def _compute(hidden: Tensor, weight: Tensor, labels: Tensor, wanted: Wanted, settings: _Settings) -> Found:
    (count, features), classes = hidden.shape, len(weight)
    pad_n, pad_h, pad_v = (-size % ALIGNMENT for size in (count, features, classes))
    if count == 0:
        # A GEMM without rows: there is nothing to cast.
        pad_n = ALIGNMENT
    if pad_n or pad_h:
        hidden = F.pad(hidden, (0, pad_h, 0, pad_n))
    if pad_v or pad_h:
        weight = F.pad(weight, (0, pad_h, 0, pad_v))
    labels = F.pad(labels, (0, pad_n), value=settings.ignore_index) if pad_n else labels
    one_gemm = wanted.weight and settings.grad_weight == "fp8"
    hidden_rows, hidden_columns, hidden_scale = quantize(hidden, E4M3, columns=one_gemm)
    weight_rows, weight_columns, weight_scale = quantize(weight, E4M3, columns=wanted.hidden)
    buffer = torch.empty((len(weight), len(hidden)), dtype=E5M2, device=hidden.device) if one_gemm else None
    operands = _Operands(
        hidden, hidden_rows, hidden_scale, weight_rows, weight_columns, weight_scale, labels, classes, buffer
    )  # fmt: skip
    sums = _Sums()
    for first in range(0, len(hidden), settings.chunk_rows):
        _add_chunk(sums, operands, first, wanted, settings)
    if buffer is not None:
        scale = torch.full((), 1 / torch.finfo(E5M2).max, device=hidden.device)
        sums.weight = float8_gemm(
            buffer, hidden_columns.t(), scale, hidden_scale,
            out_dtype=torch.float32, fast_accum=False, emulate=settings.emulate, role="grad_weight",
        )  # fmt: skip
    grad_hidden = torch.cat(sums.hidden)[:count, :features] if sums.hidden else None
    grad_weight = None if sums.weight is None else sums.weight[:classes, :features]
    return Found(torch.cat(sums.losses).sum(), grad_hidden, grad_weight)


def _add_chunk(sums: _Sums, operands: _Operands, first: int, wanted: Wanted, settings: _Settings) -> None:
    """One chunk of rows: its losses, its part of the gradients, and its columns of ``grad_columns``."""
    chunk = slice(first, first + settings.chunk_rows)
    labels, ignore_index, width = operands.labels[chunk], settings.ignore_index, len(operands.weight_rows)
    logits = float8_gemm(
        operands.hidden_rows[chunk], operands.weight_rows.t(), operands.hidden_scale, operands.weight_scale,
        out_dtype=_LOGITS, fast_accum=True, emulate=settings.emulate, role="output",
    )[:, : operands.classes]  # fmt: skip
    loss, logsumexp = cross_entropy_rows(logits, labels, ignore_index=ignore_index)
    sums.losses.append(loss)
    if wanted.hidden or operands.grad_columns is not None:
        grad, scale = cross_entropy_backward_quantize(
            logits, labels, logsumexp, E5M2,
            width=width, columns=operands.grad_columns, offset=first, ignore_index=ignore_index,
        )  # fmt: skip
        if wanted.hidden:
            found = float8_gemm(
                grad, operands.weight_columns.t(), scale, operands.weight_scale,
                out_dtype=operands.hidden.dtype, fast_accum=False, emulate=settings.emulate, role="grad_input",
            )  # fmt: skip
            sums.hidden.append(found)
    if wanted.weight and operands.grad_columns is None:
        exact = cross_entropy_backward(logits, labels, logsumexp, ignore_index=ignore_index)
        sums.weight = accumulate(sums.weight, exact.t(), operands.hidden[chunk].to(exact.dtype))
