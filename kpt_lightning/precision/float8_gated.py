"""A gated MLP in FP8 whose kernels write what the next GEMM reads: ``down(activation(gate(x)) * up(x))``.

Against three FP8 layers one by one: the input is quantized once, gate and up are one GEMM in each direction, the
product is never written in high precision, and backward keeps FP8 values in place of the input and the product.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kpt_lightning.kernels.gated import gated_backward_quantize, gated_quantize
from kpt_lightning.kernels.quantize import quantize, quantize_many
from kpt_lightning.precision.float8_linear import ALIGNMENT, Float8Settings
from kpt_lightning.precision.gemm import float8_gemm
from kpt_lightning.precision.recipes import E4M3

ACTIVATIONS = ("silu", "gelu_tanh")


def float8_gated(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str, settings: Float8Settings
) -> Tensor:
    """``(activation(x @ gate^T) * (x @ up^T)) @ down^T``, tensorwise, with one scale for gate and up together.

    There is no second derivative. Sizes of the weights are multiples of 16; rows of ``x`` are padded with zeros.

    Args:
        x: (..., K), float dtype; under autocast it is rounded to the autocast dtype first.
        gate: (N, K), the master weight, fp32 or the compute dtype. Its gradient has its dtype.
        up: (N, K), of the dtype of ``gate``.
        down: (J, N).
        activation: "silu" or "gelu_tanh".
        settings: Of a tensorwise recipe.

    Returns:
        (..., J) in the compute dtype.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count % ALIGNMENT:
        rows = F.pad(rows, (0, 0, 0, -count % ALIGNMENT))
    # Whether a layout that only a weight gradient reads is wanted; autograd's own answer is not there for the compiler.
    trains = torch.is_grad_enabled()
    inner, outer = trains and (gate.requires_grad or up.requires_grad), trains and down.requires_grad
    out: Tensor = _Gated.apply(rows, gate, up, down, activation, settings, inner, outer)  # type: ignore[no-untyped-call]
    if count % ALIGNMENT:
        out = out[:count]
    return out.reshape(*x.shape[:-1], out.shape[-1])


class _Gated(torch.autograd.Function):
    """(M, K) to (M, J), all sizes multiples of 16."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str, settings: Float8Settings,
        inner: bool, outer: bool,
    ) -> Tensor:  # fmt: skip
        parts = (gate.shape[0], up.shape[0])
        x_rows, x_columns, x_scale = quantize(x, E4M3, columns=inner)
        w_rows, w_columns, w_scale = quantize_many([gate, up], E4M3, dim=0)
        gate_up = float8_gemm(
            x_rows, w_rows.t(), x_scale, w_scale,
            out_dtype=x.dtype, fast_accum=True, emulate=settings.emulate, role="output", parts=parts,
        )  # fmt: skip
        h_rows, h_columns, h_scale = gated_quantize(gate_up, activation, E4M3, columns=outer)
        d_rows, d_columns, d_scale = quantize(down, E4M3)
        ctx.save_for_backward(
            x_columns, x_scale, w_columns, w_scale, gate_up, h_columns, h_scale, d_columns, d_scale,
        )  # fmt: skip
        ctx.activation, ctx.settings, ctx.dtypes = activation, settings, (gate.dtype, down.dtype)
        ctx.inner, ctx.outer, ctx.parts = inner, outer, parts
        # Nothing may follow: torch 2.11 compiles such a forward without its gradient.
        return float8_gemm(
            h_rows, d_rows.t(), h_scale, d_scale,
            out_dtype=x.dtype, fast_accum=True, emulate=settings.emulate, role="output",
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Not once_differentiable: the compiler would trace its bookkeeping too.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("an FP8 MLP has no second derivative; call backward without create_graph=True")
        x, x_scale, w, w_scale, gate_up, h, h_scale, d, d_scale = ctx.saved_tensors
        settings: Float8Settings = ctx.settings
        emulate, dtype = settings.emulate, settings.recipe.grad_dtype
        g_rows, g_columns, g_scale = quantize(grads[0].contiguous(), dtype, columns=ctx.outer)
        grad_down = None
        if ctx.outer:
            grad_down = float8_gemm(
                g_columns, h.t(), g_scale, h_scale,
                out_dtype=ctx.dtypes[1], fast_accum=False, emulate=emulate, role="grad_weight",
            )  # fmt: skip
        if not (ctx.inner or ctx.needs_input_grad[0]):
            return None, None, None, grad_down, None, None, None, None
        grad_h = float8_gemm(
            g_rows, d.t(), g_scale, d_scale,
            out_dtype=gate_up.dtype, fast_accum=False, emulate=emulate, role="grad_input",
        )  # fmt: skip
        z_rows, z_columns, z_scale = gated_backward_quantize(grad_h, gate_up, ctx.activation, dtype, columns=ctx.inner)
        grad_x, grad_gate, grad_up = None, None, None
        if ctx.needs_input_grad[0]:
            grad_x = float8_gemm(
                z_rows, w.t(), z_scale, w_scale,
                out_dtype=gate_up.dtype, fast_accum=False, emulate=emulate, role="grad_input", parts=ctx.parts,
            )  # fmt: skip
        if ctx.inner:
            both = float8_gemm(
                z_columns, x.t(), z_scale, x_scale,
                out_dtype=ctx.dtypes[0], fast_accum=False, emulate=emulate, role="grad_weight", parts=ctx.parts,
            )  # fmt: skip
            grad_gate, grad_up = both.chunk(2)
        return grad_x, grad_gate, grad_up, grad_down, None, None, None, None
