"""Inputs of norms, their float64 references and how near a result must be; for the tests of RMS norm."""

from typing import Any

import torch
from torch import Tensor

from kpt_lightning.kernels import rms_norm as norms
from kpt_lightning.kernels import rms_norm_triton as kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


EPS = 1e-5


# The interpreter cuts bf16 off instead of rounding it, and "llama" rounds twice.
LIMITS = {FP32: 5e-6, FP16: 3e-3, BF16: 2e-2}


def random(*shape: int, dtype: torch.dtype = FP32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_near(found: Tensor, exact: Tensor, *dtypes: torch.dtype, terms: Tensor | None = None) -> None:
    """Equal up to rounding of these dtypes, of the largest element or of terms that cancel."""
    limit = max(LIMITS[dtype] for dtype in (found.dtype, *dtypes))
    sizes = (exact if terms is None else terms).abs()
    size = sizes[sizes.isfinite()].max().item()
    torch.testing.assert_close(found.double(), exact, rtol=limit, atol=limit * size, equal_nan=True)


def exact_norm(x: Tensor, weight: Tensor, offset: float = 0.0, eps: float = EPS) -> Tensor:
    return norms.rms_norm_reference(x.double(), weight.double(), eps, offset, "gemma", torch.float64)[0]


def backward(grad: Tensor, x: Tensor, weight: Tensor, **changed: Any) -> tuple[Tensor, Tensor]:
    given = {"grad_summed": None, "offset": 0.0, "round_first": True} | changed
    rstd = norms.rms_norm_reference(x, weight, EPS, 0.0, "gemma", FP32)[1]
    return kernels.launch_backward(grad, x=x, weight=weight, rstd=rstd, **given)


def exact_backward(
    grad: Tensor, x: Tensor, weight: Tensor, grad_summed: Tensor | None = None, offset: float = 0.0
) -> tuple[Tensor, ...]:
    """By autograd in float64, independent of the formula in the reference."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    outputs = [exact_norm(x, weight, offset)] + ([] if grad_summed is None else [x * 1.0])
    grads = [each.double() for each in (grad, grad_summed) if each is not None]
    return torch.autograd.grad(outputs, [x, weight], grads)
