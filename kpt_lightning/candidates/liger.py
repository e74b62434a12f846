"""Liger's Triton kernels as functions that are never wrong in silence.

Liger's own functions write gradients over what they saved, and have no second derivative but do not say so
(https://github.com/linkedin/Liger-Kernel/tree/main/src/liger_kernel/ops).
"""

from typing import Any

import torch
from torch import Tensor


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """``x / rms(x) * (offset + weight)`` over the last dimension.

    Args:
        x: (..., n).
        weight: (n,).
        eps: Added to the mean square.
        offset: 0.0 or 1.0.

    Returns:
        As ``x``, in its dtype.
    """
    return _RmsNorm.apply(x, weight, eps, offset)  # type: ignore[no-any-return, no-untyped-call]


def liger_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, both of one shape and dtype."""
    return _SiluMul.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]


def liger_gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the tanh form of GELU, both of one shape and dtype."""
    return _GeluMul.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        from liger_kernel.ops.rms_norm import rms_norm_forward

        # With an offset all is computed in fp32 up to the end, without one the weight is applied after rounding.
        casting = "gemma" if offset else "llama"
        result, rows, rstd, block, warps, mode = rms_norm_forward(
            x.contiguous(), weight.contiguous(), eps, offset, casting, None
        )
        ctx.save_for_backward(rows, weight, rstd)
        ctx.offset, ctx.mode, ctx.block, ctx.warps = offset, mode, block, warps
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from liger_kernel.ops.rms_norm import rms_norm_backward

        _no_second_derivative("liger_rms_norm")
        rows, weight, rstd = ctx.saved_tensors
        # Not in place: what comes in may also be the gradient of a residual.
        in_place = False
        grad_x, grad_weight = rms_norm_backward(
            grads[0].contiguous(), rows, weight.contiguous(), rstd,
            ctx.offset, ctx.mode, ctx.block, ctx.warps, in_place, None,
        )  # fmt: skip
        return grad_x, grad_weight, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import swiglu_forward

        saved_gate, saved_up, result = swiglu_forward(gate.contiguous(), up.contiguous())
        ctx.save_for_backward(saved_gate, saved_up)
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.swiglu import swiglu_backward

        _no_second_derivative("liger_silu_mul")
        gate, up = _own(*ctx.saved_tensors)
        found = swiglu_backward(gate, up, grads[0].contiguous())
        return found[0], found[1]


class _GeluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.geglu import geglu_forward

        saved_gate, saved_up, result = geglu_forward(gate.contiguous(), up.contiguous())
        ctx.save_for_backward(saved_gate, saved_up)
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.geglu import geglu_backward

        _no_second_derivative("liger_gelu_mul")
        gate, up = _own(*ctx.saved_tensors)
        found = geglu_backward(gate, up, grads[0].contiguous())
        return found[0], found[1]


def _no_second_derivative(name: str) -> None:
    # The compiler would trace the question too.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} has no second derivative; call backward without create_graph=True")


def _own(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors that the kernel may write its gradients to: copies where the graph is kept for another pass."""
    # Compiled code has no such graph, and the compiler copies what is written to.
    if not torch.compiler.is_compiling() and torch._C._autograd._get_current_graph_task_keep_graph():
        return gate.clone(), up.clone()
    return gate, up
