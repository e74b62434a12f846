"""Linear layers of one input in FP8 as one: it is quantized once, in both layouts, and their products are one GEMM.

One layer is the case of one. Against ``float8_linear`` the kernels read each tensor twice, write both layouts in one
pass, and backward keeps FP8 values in place of the input. All weights have one scale.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kpt_lightning.kernels.quantize import quantize, quantize_many
from kpt_lightning.precision.float8_linear import ALIGNMENT, Float8Settings
from kpt_lightning.precision.gemm import float8_gemm
from kpt_lightning.precision.recipes import E4M3


def float8_parallel(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], settings: Float8Settings
) -> list[Tensor]:
    """``x @ weight^T + bias`` for each weight, tensorwise.

    There is no second derivative. Sizes of the weights are multiples of 16; rows of ``x`` are padded with zeros.

    Args:
        x: (..., K), float dtype; under autocast it is rounded to the autocast dtype first.
        weights: (N, K) each, master weights of one dtype, all trained or all frozen. Gradients have their dtype.
        biases: (N,) or None for each.
        settings: Of a tensorwise recipe.

    Returns:
        (..., N) for each, in the compute dtype: views of one tensor.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count % ALIGNMENT:
        rows = F.pad(rows, (0, 0, 0, -count % ALIGNMENT))
    trains = torch.is_grad_enabled() and any(each.requires_grad for each in weights)
    out: Tensor = _Parallel.apply(rows, settings, trains, *weights)  # type: ignore[no-untyped-call]
    if count % ALIGNMENT:
        out = out[:count]
    parts = torch.split(out.reshape(*x.shape[:-1], out.shape[-1]), [each.shape[0] for each in weights], dim=-1)
    return [
        part if bias is None else part + bias.to(dtype) for part, bias in zip(parts, biases, strict=True)
    ]  # fmt: skip


class _Parallel(torch.autograd.Function):
    """(M, K) @ (sum of N, K)^T, all sizes multiples of 16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Float8Settings, trains: bool, *weights: Tensor) -> Tensor:
        parts = [each.shape[0] for each in weights]
        x_rows, x_columns, x_scale = quantize(x, E4M3, columns=trains)
        w_rows, w_columns, w_scale = quantize_many(list(weights), E4M3, dim=0)
        ctx.save_for_backward(x_columns, x_scale, w_columns, w_scale)
        ctx.settings, ctx.trains, ctx.parts, ctx.dtype = settings, trains, parts, weights[0].dtype
        # Nothing may follow: torch 2.11 compiles such a forward without its gradient.
        return float8_gemm(
            x_rows, w_rows.t(), x_scale, w_scale,
            out_dtype=x.dtype, fast_accum=True, emulate=settings.emulate, role="output", parts=parts,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Not once_differentiable: the compiler would trace its bookkeeping too.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("FP8 layers have no second derivative; call backward without create_graph=True")
        x, x_scale, w, w_scale = ctx.saved_tensors
        settings: Float8Settings = ctx.settings
        g_rows, g_columns, g_scale = quantize(
            grads[0].contiguous(), settings.recipe.grad_dtype, columns=ctx.trains, rows=ctx.needs_input_grad[0]
        )
        grad_x: Tensor | None = None
        grad_weights: list[Tensor | None] = [None] * len(ctx.parts)
        if ctx.needs_input_grad[0]:
            grad_x = float8_gemm(
                g_rows, w.t(), g_scale, w_scale, out_dtype=grads[0].dtype, fast_accum=False,
                emulate=settings.emulate, role="grad_input", parts=ctx.parts,
            )  # fmt: skip
        if ctx.trains:
            whole = float8_gemm(
                g_columns, x.t(), g_scale, x_scale,
                out_dtype=ctx.dtype, fast_accum=False, emulate=settings.emulate, role="grad_weight", parts=ctx.parts,
            )  # fmt: skip
            grad_weights = list(torch.split(whole, ctx.parts))
        return grad_x, None, None, *grad_weights
