"""Gated activations (SwiGLU, GeGLU) whose result and gradient are written in FP8, in both layouts, and nowhere else."""

import math
from typing import Any

import torch
from torch import Tensor

from kpt_lightning.kernels.quantize import FLOAT8, Quantized, cast_both, empty_outputs
from kpt_lightning.kernels.triton_module import triton_module

ACTIVATIONS = ("silu", "gelu_tanh")

GELU_SLOPE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715
"""Both of the tanh form: https://docs.pytorch.org/docs/stable/generated/torch.nn.GELU.html."""

GELU_BOUND = 16.0
"""Beyond it the tanh is 1 in any precision up to fp64, and the cube of the gate need not overflow."""


def gated_quantize(gate_up: Tensor, activation: str, dtype: torch.dtype, *, columns: bool = True) -> Quantized:
    """``activation(gate) * up`` cast to FP8 as by ``quantize``; computed in fp32, rounded once.

    Two kernels on CUDA, of which each reads ``gate_up`` once; the same bits every time. No gradient passes: the
    backward pass is ``gated_backward_quantize``.

    Args:
        gate_up: (M, 2F), bf16, fp16 or fp32; the gate in the first F columns. Read without a copy where
            ``gate_up.stride(1) == 1``.
        activation: "silu", or "gelu_tanh", which is GELU with ``approximate="tanh"``.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        columns: Whether to write the transpose.

    Returns:
        (M, F) and (F, M) in ``dtype``, both contiguous, (0,) where not wanted; and the fp32 scale, a scalar tensor,
        that *multiplies* them to get the value back.

    Raises:
        ValueError: A shape, dtype or activation is none of the above.
    """
    _check(gate_up, None, activation, dtype)
    result: Quantized = torch.ops.kpt.gated_quantize(gate_up, activation, dtype, columns)
    return result


def gated_backward_quantize(
    grad: Tensor, gate_up: Tensor, activation: str, dtype: torch.dtype, *, columns: bool = True
) -> Quantized:
    """Gradient of ``activation(gate) * up`` to ``gate_up``, cast to FP8 as by ``quantize``, one scale for both halves.

    Two kernels on CUDA, of which each reads ``grad`` and ``gate_up`` once; the same bits every time.

    Args:
        grad: (M, F), gradient of the value, in the dtype of ``gate_up``.
        gate_up: (M, 2F), as given to ``gated_quantize``.
        activation: As given to ``gated_quantize``.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        columns: Whether to write the transpose.

    Returns:
        (M, 2F) and (2F, M) in ``dtype``, gradient of the gate first, both contiguous, (0,) where not wanted; and the
        fp32 scale, a scalar tensor, that *multiplies* them.

    Raises:
        ValueError: A shape, dtype or activation is none of the above.
    """
    _check(gate_up, grad, activation, dtype)
    result: Quantized = torch.ops.kpt.gated_backward_quantize(grad, gate_up, activation, dtype, columns)
    return result


def gated_value(gate_up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` in plain PyTorch: (M, 2F) -> (M, F), fp64 of fp64 and fp32 of all else."""
    gate, up = _wide(gate_up).chunk(2, dim=1)
    return _activated(gate, activation)[0] * up


def gated_gradient(grad: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """The gradient of ``gated_value`` to ``gate_up`` in plain PyTorch: (M, F), (M, 2F) -> (M, 2F); fp64 or fp32."""
    gate, up = _wide(gate_up).chunk(2, dim=1)
    value, slope = _activated(gate, activation)
    grad = _wide(grad)
    return torch.cat([grad * up * slope, grad * value], dim=1)


def _activated(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    if activation == "silu":
        share = gate.sigmoid()
        return gate * share, share * (1 + gate * (1 - share))
    bounded = gate.clamp(-GELU_BOUND, GELU_BOUND)
    # (1 + tanh(x)) / 2 is sigmoid(2 x).
    share = (2 * GELU_SLOPE * (bounded + GELU_CUBIC * bounded**3)).sigmoid()
    slope = 2 * GELU_SLOPE * (1 + 3 * GELU_CUBIC * bounded**2)
    return gate * share, share + bounded * share * (1 - share) * slope


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check(gate_up: Tensor, grad: Tensor | None, activation: str, dtype: torch.dtype) -> None:
    if dtype not in FLOAT8:
        raise ValueError(f"dtype={dtype}: must be one of {FLOAT8}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: must be one of {ACTIVATIONS}")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.dtype.is_floating_point or gate_up.dtype.itemsize > 4:
        raise ValueError(f"gate_up {(*gate_up.shape, gate_up.dtype)}: must be (M, 2F), bf16, fp16 or fp32")
    wanted = (gate_up.shape[0], gate_up.shape[1] // 2)
    if grad is not None and (grad.shape != wanted or grad.dtype != gate_up.dtype or grad.device != gate_up.device):
        raise ValueError(f"grad {(*grad.shape, grad.dtype)}: must be {(*wanted, gate_up.dtype)} on {gate_up.device}")


def _run_reference(gate_up: Tensor, activation: str, dtype: torch.dtype, columns: bool) -> Quantized:
    return cast_both(gated_value(gate_up, activation), dtype, columns=columns)


def _run_backward_reference(
    grad: Tensor, gate_up: Tensor, activation: str, dtype: torch.dtype, columns: bool
) -> Quantized:
    return cast_both(gated_gradient(grad, gate_up, activation), dtype, columns=columns)


def _run_triton(gate_up: Tensor, activation: str, dtype: torch.dtype, columns: bool) -> Quantized:
    with torch.cuda.device_of(gate_up):  # type: ignore[no-untyped-call]
        result: Quantized = triton_module("gated").gated_quantize(gate_up, activation, dtype, columns)
        return result


def _run_backward_triton(
    grad: Tensor, gate_up: Tensor, activation: str, dtype: torch.dtype, columns: bool
) -> Quantized:
    with torch.cuda.device_of(gate_up):  # type: ignore[no-untyped-call]
        result: Quantized = triton_module("gated").gated_backward_quantize(grad, gate_up, activation, dtype, columns)
        return result


def _shape(gate_up: Tensor, activation: str, dtype: torch.dtype, columns: bool) -> Quantized:
    return empty_outputs(gate_up, gate_up.shape[0], gate_up.shape[1] // 2, dtype, columns=columns)


def _backward_shape(grad: Tensor, gate_up: Tensor, activation: str, dtype: torch.dtype, columns: bool) -> Quantized:
    return empty_outputs(gate_up, gate_up.shape[0], gate_up.shape[1], dtype, columns=columns)


_library: Any = torch.library.Library("kpt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "gated_quantize(Tensor gate_up, str activation, ScalarType dtype, bool columns) -> (Tensor, Tensor, Tensor)"
)
_library.impl("gated_quantize", _run_reference, "CPU")
_library.impl("gated_quantize", _run_triton, "CUDA")
torch.library.register_fake("kpt::gated_quantize", _shape, lib=_library)
_library.define(
    "gated_backward_quantize(Tensor grad, Tensor gate_up, str activation, ScalarType dtype, bool columns) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.impl("gated_backward_quantize", _run_backward_reference, "CPU")
_library.impl("gated_backward_quantize", _run_backward_triton, "CUDA")
torch.library.register_fake("kpt::gated_backward_quantize", _backward_shape, lib=_library)
