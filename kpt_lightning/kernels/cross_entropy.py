"""Cross entropy of rows of logits, and its gradient, as operators: Triton on CUDA, plain PyTorch on a CPU.

Formulas: loss = logsumexp(x) - x[label]; its derivative by x is softmax(x) - onehot(label)
(https://pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html). The same bits every time.
"""

from typing import Any

import torch
from torch import Tensor

from kpt_lightning.kernels.triton_module import triton_module

IGNORED = -100
"""The label that torch.nn.functional.cross_entropy ignores by default."""


def cross_entropy_rows(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORED) -> tuple[Tensor, Tensor]:
    """Loss of each row, in one read of the logits.

    NaN and positive infinity among the logits of a row make its loss NaN, as in PyTorch; negative infinity is a class
    with probability 0.

    Args:
        logits: (C, V), bf16, fp16 or fp32; rows may be strided.
        labels: (C,), int64. Where a label is neither a class nor ``ignore_index``, a CPU raises RuntimeError and CUDA
            gives NaN.
        ignore_index: Rows with this label have loss 0.

    Returns:
        The losses (C,) and the logarithms of the sums of exponentials (C,), both fp32.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    found: tuple[Tensor, Tensor] = torch.ops.kpt.cross_entropy_rows(_checked(logits, labels), labels, ignore_index)
    return found


def cross_entropy_backward(logits: Tensor, labels: Tensor, logsumexp: Tensor, *, ignore_index: int = IGNORED) -> Tensor:
    """Derivative of each row's loss by its logits: softmax minus one-hot, which lies within -1 and 1.

    It is not scaled by the number of rows, for fp16 could not hold what is left of a small probability.

    Args:
        logits: (C, V), as in :func:`cross_entropy_rows`.
        labels: (C,), likewise.
        logsumexp: (C,), fp32, from there.
        ignore_index: Rows with this label are 0.

    Returns:
        (C, V), contiguous, in the dtype of ``logits``.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    found: Tensor = torch.ops.kpt.cross_entropy_backward(_checked(logits, labels), labels, logsumexp, ignore_index)
    return found


def cross_entropy_backward_quantize(
    logits: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    dtype: torch.dtype,
    *,
    width: int | None = None,
    columns: Tensor | None = None,
    offset: int = 0,
    ignore_index: int = IGNORED,
) -> tuple[Tensor, Tensor]:
    """As :func:`cross_entropy_backward` in FP8, in both layouts that the two GEMMs after it read.

    No pass for the largest magnitude is needed: it is at most 1, so the scale is the largest FP8 value.

    Args:
        logits: (C, V), as in :func:`cross_entropy_rows`.
        labels: (C,), likewise.
        logsumexp: (C,), fp32, from there.
        dtype: ``torch.float8_e5m2`` or ``torch.float8_e4m3fn``.
        width: Columns of the result, at least V; those beyond V are 0. None means V.
        columns: (width, N), ``dtype``, row-major; its columns ``offset`` to ``offset + C`` are written. None: nothing.
        offset: See there.
        ignore_index: Rows with this label are 0.

    Returns:
        (C, width) in ``dtype``, contiguous, and the fp32 scalar that multiplies both layouts to get the gradient.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    logits = _checked(logits, labels)
    width = logits.shape[1] if width is None else width
    if width < logits.shape[1]:
        raise ValueError(f"width {width} is less than the {logits.shape[1]} columns of the logits")
    if columns is not None and (
        columns.dim() != 2
        or columns.dtype != dtype
        or columns.shape[0] != width
        or columns.stride(1) != 1
        or not 0 <= offset <= columns.shape[1] - len(logits)
    ):
        raise ValueError(f"columns must be a row-major ({width}, N) {dtype} with room for {len(logits)} at {offset}")
    rows: Tensor = torch.ops.kpt.cross_entropy_backward_quantize(
        logits, labels, logsumexp, dtype, width, columns, offset, ignore_index
    )
    return rows, torch.full((), 1 / torch.finfo(dtype).max, dtype=torch.float32, device=logits.device)


def _checked(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits with adjacent columns."""
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be (rows, classes) of a float dtype, not {tuple(logits.shape)} {logits.dtype}")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64 or not labels.is_contiguous():
        raise ValueError(f"labels must be ({len(logits)},) int64, contiguous, not {tuple(labels.shape)} {labels.dtype}")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _rows(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    maximum = x.amax(dim=1, keepdim=True)
    # Minus infinity less minus infinity would be NaN in a row of masked classes.
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    logsumexp = (x - maximum).exp().sum(dim=1).log() + maximum.squeeze(1)
    kept = labels != ignore_index
    picked = x.gather(1, labels.where(kept, 0)[:, None]).squeeze(1)
    return (logsumexp - picked).masked_fill(~kept, 0.0).float(), logsumexp.float()


def _backward(logits: Tensor, labels: Tensor, logsumexp: Tensor, ignore_index: int) -> Tensor:
    return _softmax_minus_onehot(logits, labels, logsumexp, ignore_index).to(logits.dtype)


def _backward_quantize(
    logits: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    dtype: torch.dtype,
    width: int,
    columns: Tensor | None,
    offset: int,
    ignore_index: int,
) -> Tensor:
    largest = torch.finfo(dtype).max
    value = _softmax_minus_onehot(logits, labels, logsumexp, ignore_index) * largest
    rows = torch.zeros((len(logits), width), dtype=dtype, device=logits.device)
    rows[:, : logits.shape[1]] = value.clamp(-largest, largest).to(dtype)
    if columns is not None:
        columns[:, offset : offset + len(logits)] = rows.t()
    return rows


def _softmax_minus_onehot(logits: Tensor, labels: Tensor, logsumexp: Tensor, ignore_index: int) -> Tensor:
    kept = labels != ignore_index
    value = (logits.to(torch.promote_types(logits.dtype, torch.float32)) - logsumexp[:, None]).exp()
    one = torch.ones((len(labels), 1), dtype=value.dtype, device=value.device)
    return value.scatter_add(1, labels.where(kept, 0)[:, None], -one).masked_fill(~kept[:, None], 0.0).contiguous()


def _rows_cuda(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        rows: tuple[Tensor, Tensor] = triton_module("cross_entropy").launch_rows(logits, labels, ignore_index)
    return rows


def _backward_cuda(logits: Tensor, labels: Tensor, logsumexp: Tensor, ignore_index: int) -> Tensor:
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        grad: Tensor = triton_module("cross_entropy").launch_backward(logits, labels, logsumexp, ignore_index)
    return grad


def _backward_quantize_cuda(
    logits: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    dtype: torch.dtype,
    width: int,
    columns: Tensor | None,
    offset: int,
    ignore_index: int,
) -> Tensor:
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        grad: Tensor = triton_module("cross_entropy").launch_backward_quantize(
            logits, labels, logsumexp, dtype, width, columns, offset, ignore_index
        )
    return grad


def _rows_shape(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0],)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.float32)


def _backward_shape(logits: Tensor, labels: Tensor, logsumexp: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward_quantize_shape(
    logits: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    dtype: torch.dtype,
    width: int,
    columns: Tensor | None,
    offset: int,
    ignore_index: int,
) -> Tensor:
    return logits.new_empty((logits.shape[0], width), dtype=dtype)


_library: Any = torch.library.Library("kpt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("cross_entropy_rows(Tensor logits, Tensor labels, int ignore_index) -> (Tensor, Tensor)")
_library.define("cross_entropy_backward(Tensor logits, Tensor labels, Tensor logsumexp, int ignore_index) -> Tensor")
_library.define(
    "cross_entropy_backward_quantize(Tensor logits, Tensor labels, Tensor logsumexp, ScalarType dtype, SymInt width, "
    "Tensor(a!)? columns, SymInt offset, int ignore_index) -> Tensor"
)
for _name, _cpu, _cuda, _fake in (
    ("cross_entropy_rows", _rows, _rows_cuda, _rows_shape),
    ("cross_entropy_backward", _backward, _backward_cuda, _backward_shape),
    ("cross_entropy_backward_quantize", _backward_quantize, _backward_quantize_cuda, _backward_quantize_shape),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"kpt::{_name}", _fake, lib=_library)
