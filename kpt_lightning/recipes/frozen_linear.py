"""A linear layer whose weight is frozen and kept in 8 or 4 bits, for adapters beside it."""

from collections.abc import Sequence
from dataclasses import replace
from math import gcd
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpt_lightning.errors import ConfigError, MissingDependencyError
from kpt_lightning.optional import TORCHAO

Base = Literal["fp8", "int4"]

# Values that share a scale, and scales that share one: https://arxiv.org/abs/2305.14314, section 3.
NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256


class FrozenLinear(nn.Module):
    """``x @ weight.T + bias``; the weight is dequantized in each pass and never kept that way.

    torchao's own layers keep the dequantized weight for the backward pass, which would undo the saving. The bytes of
    the quantized weight are buffers of uint8, so that casting a model does not round its scales.
    """

    def __init__(self, linear: nn.Linear, base: Base) -> None:
        """Quantize the weight of a layer, which stays as it is.

        Args:
            linear: Weight of shape ``(out, in)``.
            base: fp8 is e4m3 with one scale a row; int4 is NF4 with one 8-bit scale for 64 values.

        Raises:
            ConfigError: int4 and the weight's size is no multiple of 64.
            MissingDependencyError: torchao is absent or too old.
        """
        super().__init__()
        self.in_features, self.out_features, self.base = linear.in_features, linear.out_features, base
        weight = _quantized(linear.weight.detach(), base)
        self._names, self._context = weight.__tensor_flatten__()  # type: ignore[attr-defined]
        self._kind = type(weight)
        self._forms: list[tuple[torch.dtype, torch.Size]] = []
        for name in self._names:
            inner: Tensor = getattr(weight, name)
            self._forms.append((inner.dtype, inner.shape))
            # A tensor of one element may have any stride, which view refuses: the copy has stride 1.
            flat = inner.flatten().clone(memory_format=torch.contiguous_format)
            self.register_buffer(f"bytes_{name}", flat.view(torch.uint8))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def parts(self) -> list[Tensor]:
        """Bytes of the quantized weight and of its scales, uint8."""
        return [cast(Tensor, getattr(self, f"bytes_{name}")) for name in self._names]

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32, shape ``(out, in)``: a new tensor at each call."""
        return self.dequantized(self.parts)

    def dequantized(self, parts: Sequence[Tensor]) -> Tensor:
        """The weight that ``parts`` are the bytes of."""
        inner = {
            name: part.view(dtype).reshape(shape)
            for name, part, (dtype, shape) in zip(self._names, parts, self._forms, strict=True)
        }
        context = self._context
        if "tensor_meta" in context:
            context = context | {"tensor_meta": replace(context["tensor_meta"], device=parts[0].device)}
        shape = torch.Size((self.out_features, self.in_features))
        weight = self._kind.__tensor_unflatten__(inner, context, shape, (self.in_features, 1))  # type: ignore[attr-defined]
        dense: Tensor = weight.get_original_weight() if self.base == "int4" else weight.dequantize()
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of shape ``(..., in)`` to ``(..., out)``, in autocast's dtype or that of ``x``."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y = cast(Tensor, _FrozenProduct.apply(x, self, *self.parts))  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """As nn.Linear, with the format."""
        return f"in_features={self.in_features}, out_features={self.out_features}, base={self.base}"


class _FrozenProduct(torch.autograd.Function):
    """Keeps the bytes for the backward pass, not the dequantized weight."""

    @staticmethod
    def forward(context: Any, x: Tensor, layer: FrozenLinear, *parts: Tensor) -> Tensor:
        context.layer = layer
        context.save_for_backward(*parts)
        return functional.linear(x, layer.dequantized(parts).to(x.dtype))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = context.saved_tensors
        (gradient,) = gradients
        weight = context.layer.dequantized(parts).to(gradient.dtype)
        return (gradient @ weight, None, *(None for _ in parts))


def _quantized(weight: Tensor, base: Base) -> Tensor:
    TORCHAO.require(f"base={base!r}")
    import torchao.quantization as library

    weight = weight.float()
    if base == "fp8":
        holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        holder.weight = nn.Parameter(weight, requires_grad=False)
        library.quantize_(holder, library.Float8WeightOnlyConfig())
        return holder.weight
    if not hasattr(library, "to_nf4"):
        rule = f"base='int4' needs torchao 0.18 or newer, found {TORCHAO.version}"
        raise MissingDependencyError(f"{rule}. Run: pip install -U torchao")
    if weight.numel() % NF4_BLOCK:
        rule = f"a weight of {tuple(weight.shape)} is no multiple of {NF4_BLOCK} values"
        raise ConfigError("base", base, rule, "Take 'fp8', or leave that layer out of lora.target_modules")
    scales = gcd(weight.numel() // NF4_BLOCK, NF4_SCALE_BLOCK)
    quantized: Tensor = library.to_nf4(weight, NF4_BLOCK, scales)
    return quantized
