"""A linear layer whose three GEMMs run in FP8, with a high-precision weight that the optimizer sees.

The class is put on an existing ``nn.Linear`` object (see convert.py): the module, its Parameters, hooks and state-dict
keys stay the same objects.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpt_lightning.precision.cast import to_float8
from kpt_lightning.precision.gemm import float8_gemm
from kpt_lightning.precision.recipes import E4M3, Recipe

ALIGNMENT = 16
"""Sizes of an FP8 GEMM are multiples of 16: https://docs.nvidia.com/cuda/cublas/#tensor-core-usage."""


@dataclass(frozen=True, slots=True)
class Float8Settings:
    """What one layer, or all layers, share. Attributes as in the recipe and Float8Config."""

    recipe: Recipe
    emulate: bool


class Float8Linear(nn.Linear):
    """``nn.Linear`` in FP8. Made by ``convert_to_float8``, never constructed."""

    float8: Float8Settings

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the autocast dtype or that of ``input``."""
        return self.product(input, self.weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same with another weight."""
        return float8_linear(x, weight, self.bias, self.float8)

    def extra_repr(self) -> str:
        """Adds the recipe to nn.Linear's own text."""
        emulated = ", emulated" if self.float8.emulate else ""
        return f"{super().extra_repr()}, float8={self.float8.recipe.name}{emulated}"


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Float8Settings) -> Tensor:
    """``x @ weight^T + bias`` with FP8 GEMMs forward and backward.

    Sizes that are no multiple of 16 are padded with zeros, which change no result. There is no second derivative:
    ``create_graph=True`` and a backward pass through the gradient raise RuntimeError.

    Args:
        x: (..., K), float dtype; under autocast it is rounded to the autocast dtype first, as in nn.Linear.
        weight: (N, K), the master weight, fp32 or the compute dtype. Its gradient has its dtype.
        bias: (N,) or None.
        settings: Recipe, and whether to emulate.

    Returns:
        (..., N) in the compute dtype.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # The GEMM reads both operands along K.
    rows, weight = _row_major(x.to(dtype).reshape(-1, x.shape[-1])), _row_major(weight)
    if rows.shape[0] == 0:
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    pad_m, pad_k, pad_n = (-rows.shape[0] % ALIGNMENT, -rows.shape[1] % ALIGNMENT, -weight.shape[0] % ALIGNMENT)
    if pad_m or pad_k:
        rows = F.pad(rows, (0, pad_k, 0, pad_m))
    if pad_k or pad_n:
        weight = F.pad(weight, (0, pad_k, 0, pad_n))
    out: Tensor = _Float8Matmul.apply(rows, weight, settings)  # type: ignore[no-untyped-call]
    if pad_m or pad_n:
        out = out[: out.shape[0] - pad_m, : out.shape[1] - pad_n]
    if bias is not None:
        out = out + bias.to(dtype)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], out.shape[-1])


class _Float8Matmul(torch.autograd.Function):
    """(M, K) @ (N, K)^T, all sizes multiples of 16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, settings: Float8Settings) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        recipe = settings.recipe
        axis = -1 if recipe.rowwise else None
        x8, x_scale = to_float8(x, E4M3, axis=axis, power_of_two=recipe.power_of_two_scales)
        w8, w_scale = to_float8(weight, E4M3, axis=axis, power_of_two=recipe.power_of_two_scales)
        # Nothing may follow the GEMM here, no cast either: torch 2.11 compiles such a forward without its gradient.
        return float8_gemm(
            x8, w8.t(), x_scale, w_scale.reshape(1, -1) if recipe.rowwise else w_scale,
            out_dtype=x.dtype, fast_accum=True, emulate=settings.emulate, role="output",
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # Not once_differentiable: the compiler would trace its bookkeeping too.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("Float8Linear has no second derivative; call backward without create_graph=True")
        x, weight = ctx.saved_tensors
        settings: Float8Settings = ctx.settings
        grad = grads[0].contiguous()
        grad_input = _grad_input(grad, weight, settings) if ctx.needs_input_grad[0] else None
        grad_weight = _grad_weight(grad, x, weight.dtype, settings) if ctx.needs_input_grad[1] else None
        return grad_input, grad_weight, None


def _grad_input(grad: Tensor, weight: Tensor, settings: Float8Settings) -> Tensor:
    """(M, N) @ (N, K)."""
    recipe = settings.recipe
    power_of_two = recipe.power_of_two_scales
    g8, g_scale = to_float8(grad, recipe.grad_dtype, axis=-1 if recipe.rowwise else None, power_of_two=power_of_two)
    axis = 0 if recipe.weight_rowwise_in_grad_input else None
    w8, w_scale = to_float8(weight, E4M3, axis=axis, power_of_two=power_of_two)
    if recipe.rowwise and axis is None:
        w_scale = w_scale.expand(1, weight.shape[1]).contiguous()
    return float8_gemm(
        g8, _column_major(w8), g_scale, w_scale,
        out_dtype=grad.dtype, fast_accum=False, emulate=settings.emulate, role="grad_input",
    )  # fmt: skip


def _grad_weight(grad: Tensor, x: Tensor, dtype: torch.dtype, settings: Float8Settings) -> Tensor:
    """(N, M) @ (M, K), in the dtype of the weight."""
    recipe = settings.recipe
    if not recipe.grad_weight_fp8:
        return (grad.t() @ x).to(dtype)
    axis, power_of_two = 0 if recipe.rowwise else None, recipe.power_of_two_scales
    g8, g_scale = to_float8(grad, recipe.grad_dtype, axis=axis, power_of_two=power_of_two)
    x8, x_scale = to_float8(x, E4M3, axis=axis, power_of_two=power_of_two)
    return float8_gemm(
        g8.t().contiguous(), _column_major(x8), g_scale.reshape(-1, 1) if recipe.rowwise else g_scale, x_scale,
        out_dtype=dtype, fast_accum=False, emulate=settings.emulate, role="grad_weight",
    )  # fmt: skip


def _row_major(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _column_major(x: Tensor) -> Tensor:
    """The same (rows, columns) tensor with columns contiguous: a physical transpose of one byte an element."""
    return x.t().contiguous().t()
