"""Logits that are computed when somebody looks at them, so that a loss that needs hidden states alone never does.

The tensor has the shape, dtype and place in the autograd graph of the logits; any operation on it computes them first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True, slots=True)
class Operands:
    """What logits are computed from: ``linear(hidden, weight, bias)`` in the dtype of ``hidden``.

    Attributes:
        hidden: (..., H).
        weight: (V, H).
        bias: (V,) or None.
        versions: Version counters of the three when the logits were due.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    versions: tuple[int, ...]

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "Operands":
        """Of tensors as they are now."""
        return cls(hidden, weight, bias, _versions(hidden, weight, bias))

    def logits(self) -> Tensor:
        """The logits in the dtype of ``hidden``, outside autograd.

        Raises:
            RuntimeError: An operand was changed in place since.
        """
        if _versions(self.hidden, self.weight, self.bias) != self.versions:
            raise RuntimeError(
                "the weight of the output head was changed, as by the optimizer, before the logits of this forward "
                "pass were looked at, and they were not computed until now; read them before optimizer.step(), "
                "or leave out the candidate 'linear_cross_entropy'"
            )
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            return _linear(self.hidden, self.weight, self.bias)


class DeferredLogits(Tensor):
    """Made by :func:`defer`.

    Attributes:
        operands: What they are computed from.
        bypassed: A loss was computed from ``operands``: no gradient of it will come through these logits.
    """

    operands: Operands
    bypassed: bool
    _value: Tensor | None

    @property
    def computed(self) -> bool:
        """Whether somebody looked at the values."""
        return self._value is not None

    def value(self) -> Tensor:
        """A plain tensor outside autograd, computed once.

        Raises:
            RuntimeError: As :meth:`Operands.logits`.
        """
        if self._value is None:
            self._value = self.operands.logits().to(self.dtype)
        return self._value

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Everything goes on to autograd and then to ``__torch_dispatch__``, but what asks for memory or a gradient."""
        name = getattr(func, "__name__", "")
        # A property's function is called __get__.
        memory = name in _READS_MEMORY or func is _DATA
        with torch._C.DisableTorchFunctionSubclass():
            if memory:
                args, kwargs = tree_map_only(DeferredLogits, torch.ops.aten.alias, (tuple(args), kwargs))
            elif name in _WAITS_FOR_GRADIENT and args[0].bypassed:
                raise RuntimeError(
                    f"{name}: the loss was computed without these logits, and gives them no gradient; leave out the "
                    "candidate 'linear_cross_entropy' to have it"
                )
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Below autograd: any operation finds the values, but for a cast, which trainers apply to all that they see."""
        if func is torch.ops.aten._to_copy.default and not args[0].computed and set(kwargs or {}) == {"dtype"}:
            return _wrapped(args[0].shape, kwargs["dtype"], args[0].operands)  # type: ignore[index]
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.value, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def defer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> DeferredLogits:
    """Logits of ``linear(hidden, weight, bias)`` in the autocast dtype or that of ``hidden``, not computed yet.

    Args:
        hidden: (..., H), float dtype.
        weight: (V, H).
        bias: (V,) or None.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    # Made outside of _Defer, in whose forward pass the operands belong to no graph.
    operands = Operands.of(hidden, weight, bias)
    logits: DeferredLogits = _Defer.apply(hidden, weight, bias, operands)  # type: ignore[no-untyped-call]
    return logits


def _wrapped(shape: Sequence[int], dtype: torch.dtype, operands: Operands) -> DeferredLogits:
    made: DeferredLogits = Tensor._make_wrapper_subclass(
        DeferredLogits, shape, dtype=dtype, device=operands.hidden.device
    )  # fmt: skip
    made.operands, made.bypassed, made._value = operands, False, None
    return made


# They need memory, which the tensor has none of.
_READS_MEMORY = frozenset(
    {
        "__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "__repr__", "data_ptr", "numpy", "storage",
        "tolist", "untyped_storage",
    }
)  # fmt: skip
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]

_WAITS_FOR_GRADIENT = frozenset({"register_hook", "retain_grad"})


class _Defer(torch.autograd.Function):
    """Gives the logits their gradient, whether they were computed or not."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, operands: Operands
    ) -> DeferredLogits:  # fmt: skip
        ctx.save_for_backward(hidden, weight)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _wrapped((*hidden.shape[:-1], len(weight)), hidden.dtype, operands)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        (grad,) = grads
        if grad is None:
            return None, None, None, None
        rows = grad.reshape(-1, grad.shape[-1])
        grad_hidden, grad_weight, grad_bias = None, None, None
        if ctx.needs_input_grad[0]:
            grad_hidden = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ hidden.reshape(-1, hidden.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(dim=0).to(ctx.bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(each._version for each in tensors if each is not None)
