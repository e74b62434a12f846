"""Output head and cross entropy together, a chunk of rows at a time: the logits of all rows never exist at once.

The gradients are made in the forward pass, from the chunk of logits that is there, and wait for the scalar that
backward brings: logits are computed once, and neither they nor their gradient are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import functional as F

from kpt_lightning.kernels.cross_entropy import IGNORED, cross_entropy_backward, cross_entropy_rows

Reduction = Literal["mean", "sum"]

# A chunk of logits: large enough for a GEMM to fill a GPU, and small beside the weight of a large vocabulary.
_CHUNK_BYTES, _FEWEST_ROWS, _ALIGNED_ROWS = 2**30, 1024, 128


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of what gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass(frozen=True, slots=True)
class Found:
    """Sum of the losses of all rows, fp32 scalar, and its derivatives; None where not wanted."""

    total: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


Compute = Callable[[Tensor, Tensor, Tensor | None, Tensor, Wanted], Found]
"""From hidden (N, H), weight (V, H), bias (V,) or None, labels (N,), and what is wanted."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORED,
    reduction: Reduction = "mean",
    num_items: Tensor | int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """``cross_entropy(linear(hidden, weight, bias).float(), labels)``, to rounding, in loss and gradients.

    The products run in the autocast dtype, else in that of ``hidden``; the gradient of the weight is summed over chunks
    in fp32. Shifting the labels is the caller's. Deterministic where the GEMMs of PyTorch are. There is no second
    derivative: ``create_graph=True`` raises RuntimeError in backward.

    Args:
        hidden: (N, H), float dtype.
        weight: (V, H), float dtype.
        labels: (N,), int64.
        bias: (V,) or None.
        ignore_index: Rows with this label count for nothing.
        reduction: "mean" over the rows that count, or "sum".
        num_items: With "sum", what the sum is divided by.
        chunk_rows: Rows of logits that exist at once; None: about 1 GiB of them, and at least 1024 rows.

    Returns:
        fp32 scalar. Without any row that counts the mean is NaN and its gradients are 0, as in PyTorch.

    Raises:
        ValueError: Shapes, reduction or chunk_rows do not fit.
    """
    divisor = loss_divisor(hidden, weight, labels, ignore_index, reduction, num_items)
    rows = chunk_size(len(hidden), len(weight), chunk_rows)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, wanted: Wanted) -> Found:
        bias = None if bias is None else bias.to(dtype)
        return _all_chunks(hidden.to(dtype), weight.to(dtype), bias, labels, wanted, rows, ignore_index)

    return scaled_loss(hidden, weight, bias, labels, divisor, compute)


def loss_divisor(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: Reduction,
    num_items: Tensor | int | None,
) -> Tensor:
    """What the sum of all losses is divided by, fp32 scalar on the device of ``hidden``; shapes are checked.

    Raises:
        ValueError: As :func:`linear_cross_entropy`.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} are not (N, H) and (V, H)")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} are not one for each of {len(hidden)} rows")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is neither 'mean' nor 'sum'")
    if reduction == "mean":
        if num_items is not None:
            raise ValueError("num_items goes with reduction='sum'")
        return (labels != ignore_index).sum().float()
    if isinstance(num_items, Tensor):
        return num_items.to(hidden.device, torch.float32).reshape(())
    return torch.full((), 1.0 if num_items is None else float(num_items), device=hidden.device)


def chunk_size(rows: int, classes: int, asked: int | None) -> int:
    """Rows of a chunk: as asked, or by the size of the logits, such that all chunks are about equal.

    Raises:
        ValueError: ``asked`` is not positive.
    """
    if asked is not None:
        if asked < 1:
            raise ValueError(f"chunk_rows={asked} is not positive")
        return asked
    # Two bytes for each: under autocast or in bf16 weights; fp32 logits take twice as much.
    largest = max(_FEWEST_ROWS, _CHUNK_BYTES // (2 * classes))
    even = -(-rows // max(1, -(-rows // largest)))
    return max(_ALIGNED_ROWS, -(-even // _ALIGNED_ROWS) * _ALIGNED_ROWS)


# Imports the compiler at the first call only. torch 2.11 compiles what follows a custom operator in the forward pass of
# an autograd.Function without its gradient, and the loop over chunks has nothing to fuse.
@_disable_dynamo
def scaled_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, divisor: Tensor, compute: Compute
) -> Tensor:
    """What ``compute`` finds, divided by ``divisor`` (fp32 scalar), with its derivatives in the autograd graph.

    Runs as it is inside compiled code, which is cut in two there.
    """
    recorded = torch.is_grad_enabled()
    wanted = Wanted(
        hidden=recorded and hidden.requires_grad,
        weight=recorded and weight.requires_grad,
        bias=recorded and bias is not None and bias.requires_grad,
    )
    loss: Tensor = _ScaledLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels.contiguous(), divisor, compute, wanted
    )
    return loss


def accumulate(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b`` in fp32 or wider, in place where there is a total; products of 16-bit operands stay exact."""
    if a.is_cuda and a.element_size() == 2:
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    wide = torch.promote_types(a.dtype, torch.float32)
    product = a.to(wide) @ b.to(wide)
    return product if total is None else total.add_(product)


class _ScaledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        divisor: Tensor,
        compute: Compute,
        wanted: Wanted,
    ) -> Tensor:
        # What is computed has its dtype; autocast would round the sums in fp32, too.
        with torch.autocast(hidden.device.type, enabled=False):
            found = compute(hidden, weight, bias, labels, wanted)
        ctx.save_for_backward(found.hidden, found.weight, found.bias, divisor)
        ctx.dtypes = [hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype]
        return found.total / divisor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative; call backward without create_graph=True")
        *found, divisor = ctx.saved_tensors
        # Where no row counts the loss is 0 / 0, and the derivatives stay 0.
        scale = grads[0].float() / divisor.masked_fill(divisor == 0, 1.0)
        # A scalar is rounded to the dtype of the tensor that it multiplies: hence first to fp32.
        scaled = (
            None if each is None else (each.to(torch.promote_types(each.dtype, scale.dtype)) * scale).to(dtype)
            for each, dtype in zip(found, ctx.dtypes, strict=True)
        )  # fmt: skip
        return (*scaled, None, None, None, None)


def _all_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, wanted: Wanted, rows: int, ignore_index: int
) -> Found:
    """All three tensors have the compute dtype."""
    losses: list[Tensor] = []
    grad_hidden: list[Tensor] = []
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    for first in range(0, max(1, len(hidden)), rows):
        chunk = hidden[first : first + rows]
        loss, grad = _one_chunk(chunk, weight, bias, labels[first : first + rows], wanted, ignore_index)
        losses.append(loss)
        if grad is None:
            continue
        if wanted.hidden:
            grad_hidden.append(grad @ weight)
        if wanted.weight:
            grad_weight = accumulate(grad_weight, grad.t(), chunk)
        if wanted.bias:
            part = grad.sum(dim=0, dtype=torch.float32)
            grad_bias = part if grad_bias is None else grad_bias + part
        # The next chunk's logits take its place.
        del grad
    return Found(torch.cat(losses).sum(), torch.cat(grad_hidden) if grad_hidden else None, grad_weight, grad_bias)


def _one_chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, wanted: Wanted, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Losses of the rows, and the gradient of their sum by the logits."""
    logits = F.linear(hidden, weight, bias)
    loss, logsumexp = cross_entropy_rows(logits, labels, ignore_index=ignore_index)
    if not (wanted.hidden or wanted.weight or wanted.bias):
        return loss, None
    return loss, cross_entropy_backward(logits, labels, logsumexp, ignore_index=ignore_index)
