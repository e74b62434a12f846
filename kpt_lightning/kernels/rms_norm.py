"""RMSNorm with its statistics in fp32: alone, after a residual addition, and straight to FP8 in both layouts.

    ``y = x * rsqrt(mean(x^2) + eps) * (weight + offset)``

https://arxiv.org/abs/1910.07467; the two casting rules are those of transformers' LlamaRMSNorm and GemmaRMSNorm.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from kpt_lightning.kernels.quantize import FLOAT8, cast_both, empty_outputs
from kpt_lightning.kernels.triton_module import triton_module

Casting = Literal["llama", "gemma"]

_CASTINGS = ("llama", "gemma")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LONGEST_ROW = 16384
"""A program holds a whole row in its registers."""


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm over the last dimension, differentiable once in ``x`` and ``weight``.

    Statistics and products are fp32; the gradients too, up to their last rounding. Forward and backward give the same
    bits every time on one kind of GPU. NaN and infinity spread over their row, as in PyTorch.

    Args:
        x: (..., K), bf16, fp16 or fp32, any strides; read without a copy where the last dimension has stride 1 and the
            others fold into one. K at most ``LONGEST_ROW``.
        weight: (K,), of one of these dtypes.
        eps: Added to the mean square.
        offset: Added to the weight, in fp32: 1.0 in Gemma.
        casting: "llama" rounds ``x * rsqrt(...)`` to the dtype of ``x`` before it is multiplied, "gemma" does not.
        out_dtype: dtype of the result. Default: that of ``x`` in "gemma", that of ``x * weight`` in "llama".

    Returns:
        (..., K), contiguous.

    Raises:
        ValueError: A shape, a dtype or ``casting`` is none of the above.
    """
    _check(x, weight, casting)
    out_dtype = _result_dtype(x.dtype, weight.dtype, casting, out_dtype)
    y: Tensor = torch.ops.kpt.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, offset, casting, out_dtype)[0]
    return y.reshape(x.shape)


def rms_norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``summed = x + residual`` and its ``rms_norm``, with one read of both; differentiable once.

    Args:
        x: As in ``rms_norm``.
        residual: Of the shape of ``x``; its dtype may differ.
        weight: As in ``rms_norm``.
        eps: As in ``rms_norm``.
        offset: As in ``rms_norm``.
        casting: As in ``rms_norm``, with ``summed`` in the place of ``x``.
        out_dtype: As in ``rms_norm``.

    Returns:
        The norm of the sum, and the sum in the dtype that ``x + residual`` has; both contiguous.

    Raises:
        ValueError: As in ``rms_norm``, or the shapes of ``x`` and ``residual`` differ.
    """
    _check(x, weight, casting)
    if residual.shape != x.shape or residual.dtype not in _DTYPES:
        raise ValueError(f"residual {(*residual.shape, residual.dtype)}: shape {(*x.shape,)}, bf16, fp16 or fp32")
    out_dtype = _result_dtype(torch.promote_types(x.dtype, residual.dtype), weight.dtype, casting, out_dtype)
    k = x.shape[-1]
    y, summed, _ = torch.ops.kpt.rms_norm_add(
        x.reshape(-1, k), residual.reshape(-1, k), weight, eps, offset, casting, out_dtype
    )
    return y.reshape(x.shape), summed.reshape(x.shape)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, *, dtype: torch.dtype, offset: float = 0.0, casting: Casting = "llama"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``quantize(rms_norm(x, ...), dtype)`` in two reads of ``x``, without rounding to a wider dtype before.

    No gradient passes: a linear layer that reads the result in its own ``torch.autograd.Function`` calls
    :func:`rms_norm_backward`.

    Args:
        x: (M, K), otherwise as in ``rms_norm``.
        weight: As in ``rms_norm``.
        eps: As in ``rms_norm``.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        offset: As in ``rms_norm``.
        casting: As in ``rms_norm``.

    Returns:
        (M, K) and (K, M) in ``dtype``, both contiguous; the fp32 scalar that *multiplies* them to get the norm; and
        ``rstd`` (M,) fp32 for the backward pass.

    Raises:
        ValueError: As in ``rms_norm``; or ``x`` has not two dimensions, or ``dtype`` is none of the above.
    """
    _check(x, weight, casting)
    if x.dim() != 2 or dtype not in FLOAT8:
        raise ValueError(f"x {(*x.shape,)} to {dtype}: two dimensions, to one of {FLOAT8}")
    written: tuple[Tensor, Tensor, Tensor, Tensor]
    written = torch.ops.kpt.rms_norm_quantize(x, weight, eps, offset, casting, dtype)
    return written


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    grad_summed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``rms_norm``; it has no derivative itself.

    Args:
        grad: (M, K), bf16, fp16 or fp32, gradient of the norm.
        x: (M, K), what was normalized.
        weight: (K,).
        rstd: (M,) fp32, of the forward pass.
        offset: As there.
        casting: As there.
        grad_summed: (M, K), added to the gradient of ``x``: what flows along the residual.

    Returns:
        Gradients of ``x`` and ``weight`` in their dtypes. The sum over rows has a fixed order.
    """
    grads: tuple[Tensor, Tensor]
    grads = torch.ops.kpt.rms_norm_backward(grad, grad_summed, x, weight, rstd, offset, casting)
    return grads


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``y`` and ``rstd`` in plain PyTorch: what runs on a CPU, and in float64 what kernels are held against.

    Args:
        x: (M, K); in float64 all is.
        weight: (K,).
        eps: Added to the mean square.
        offset: Added to the weight.
        casting: "llama" or "gemma".
        out_dtype: dtype of ``y``.
    """
    normalized, rstd = _normalize(x, eps)
    return (_rounded(normalized, x, casting) * _scale(weight, normalized, offset)).to(out_dtype), rstd


def rms_norm_backward_reference(
    grad: Tensor,
    grad_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    casting: str,
) -> tuple[Tensor, Tensor]:
    """``rms_norm_backward`` in plain PyTorch; arguments as there."""
    wide = rstd.dtype
    grad, normalized = grad.contiguous().to(wide), x.contiguous().to(wide) * rstd[:, None]
    weighted = grad * _scale(weight, normalized, offset)
    grad_x = (weighted - normalized * (weighted * normalized).mean(-1, keepdim=True)) * rstd[:, None]
    if grad_summed is not None:
        grad_x = grad_x + grad_summed.to(wide)
    return grad_x.to(x.dtype), (grad * _rounded(normalized, x, casting)).sum(0).to(weight.dtype)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values = x.contiguous().to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(values.square().mean(-1) + eps)
    return values * rstd[:, None], rstd


def _rounded(normalized: Tensor, x: Tensor, casting: str) -> Tensor:
    return normalized.to(x.dtype).to(normalized.dtype) if casting == "llama" else normalized


def _scale(weight: Tensor, like: Tensor, offset: float) -> Tensor:
    return weight.to(like.dtype) + offset


def _check(x: Tensor, weight: Tensor, casting: str) -> None:
    if casting not in _CASTINGS:
        raise ValueError(f"casting={casting!r}: must be one of {_CASTINGS}")
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        raise ValueError(f"x {x.dtype}, weight {weight.dtype}: bf16, fp16 or fp32 each")
    if x.dim() == 0 or weight.shape != x.shape[-1:] or not 0 < x.shape[-1] <= LONGEST_ROW:
        raise ValueError(f"x {(*x.shape,)}, weight {(*weight.shape,)}: (..., K) and (K,), K 1 to {LONGEST_ROW}")


def _result_dtype(x: torch.dtype, weight: torch.dtype, casting: Casting, wanted: torch.dtype | None) -> torch.dtype:
    if wanted is None:
        return x if casting == "gemma" else torch.promote_types(x, weight)
    if wanted not in _DTYPES:
        raise ValueError(f"out_dtype={wanted}: must be one of {_DTYPES}")
    return wanted


_kernels = partial(triton_module, "rms_norm")


def _add_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting: str, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    summed = (x + residual).contiguous()
    y, rstd = rms_norm_reference(summed, weight, eps, offset, casting, out_dtype)
    return y, summed, rstd


def _quantize_reference(
    x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, rstd = rms_norm_reference(x, weight, eps, offset, casting, torch.float32)
    return *cast_both(y, dtype), rstd


def _norm_triton(
    x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(x.device):
        y, _, rstd = _kernels().launch_forward(x, None, weight, eps, offset, casting == "llama", out_dtype)
    return y, rstd


def _add_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting: str, out_dtype: torch.dtype
) -> Any:
    with torch.cuda.device(x.device):
        return _kernels().launch_forward(x, residual, weight, eps, offset, casting == "llama", out_dtype)


def _quantize_triton(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, dtype: torch.dtype) -> Any:
    with torch.cuda.device(x.device):
        return _kernels().launch_quantize(x, weight, eps, offset, casting == "llama", dtype)


def _backward_triton(
    grad: Tensor,
    grad_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    casting: str,
) -> Any:
    with torch.cuda.device(x.device):
        return _kernels().launch_backward(grad, grad_summed, x, weight, rstd, offset, casting == "llama")


def _norm_shape(
    x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape[:1], dtype=torch.float32)


def _add_shape(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting: str, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _norm_shape(x, weight, eps, offset, casting, out_dtype)
    return y, x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype)), rstd


def _quantize_shape(
    x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_outputs(x, x.shape[0], x.shape[1], dtype), x.new_empty(x.shape[:1], dtype=torch.float32)


def _backward_shape(
    grad: Tensor,
    grad_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    casting: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, offset, casting, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.offset, ctx.casting = offset, casting


def _norm_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    grads = torch.ops.kpt.rms_norm_backward(grad, None, x, weight, rstd, ctx.offset, ctx.casting)
    return *grads, None, None, None, None


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _, offset, casting, _ = inputs
    _, summed, rstd = output
    ctx.save_for_backward(summed, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.offset, ctx.casting, ctx.dtypes = offset, casting, (x.dtype, residual.dtype)


def _add_backward(ctx: Any, grad: Tensor, grad_summed: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    summed, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.kpt.rms_norm_backward(
        grad, grad_summed, summed, weight, rstd, ctx.offset, ctx.casting
    )
    x, residual = ctx.dtypes
    return grad_x.to(x), grad_x.to(residual), grad_weight, None, None, None, None


def _no_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "kpt.rms_norm has no second derivative (call backward without create_graph=True), and what it casts to FP8 has "
        "none at all (call rms_norm_backward in an autograd function of your own)"
    )


# As in precision/gemm.py: no Python wrapper around every call, and strides as in eager mode.
_library: Any = torch.library.Library("kpt", "FRAGMENT")  # type: ignore[no-untyped-call]
_NORM = "Tensor weight, float eps, float offset, str casting, ScalarType"
for _name, _signature, _cpu, _cuda, _fake in (
    ("rms_norm", f"(Tensor x, {_NORM} out_dtype) -> (Tensor, Tensor)", rms_norm_reference, _norm_triton, _norm_shape),
    (
        "rms_norm_add",
        f"(Tensor x, Tensor residual, {_NORM} out_dtype) -> (Tensor, Tensor, Tensor)",
        _add_reference,
        _add_triton,
        _add_shape,
    ),
    (
        "rms_norm_quantize",
        f"(Tensor x, {_NORM} dtype) -> (Tensor, Tensor, Tensor, Tensor)",
        _quantize_reference,
        _quantize_triton,
        _quantize_shape,
    ),
    (
        "rms_norm_backward",
        "(Tensor grad, Tensor? grad_summed, Tensor x, Tensor weight, Tensor rstd, float offset, str casting) "
        "-> (Tensor, Tensor)",
        rms_norm_backward_reference,
        _backward_triton,
        _backward_shape,
    ),
):
    _library.define(_name + _signature, tags=(torch.Tag.needs_exact_strides,))
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"kpt::{_name}", _fake, lib=_library)

torch.library.register_autograd("kpt::rms_norm", _norm_backward, setup_context=_save_norm, lib=_library)
torch.library.register_autograd("kpt::rms_norm_add", _add_backward, setup_context=_save_add, lib=_library)
for _name in ("rms_norm_quantize", "rms_norm_backward"):
    torch.library.register_autograd(f"kpt::{_name}", _no_derivative, lib=_library)
