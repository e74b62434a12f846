"""Each FP8 layer against the linear layer that it stands for, on what the model really gave it and got from it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.precision.float8_linear import Float8Linear, float8_linear
from kpt_lightning.validation.numerics import sqnr_db

ROWS = 256
"""Rows of activations looked at in each layer, evenly strided: what is kept of all layers stays far below a model."""


@dataclass(slots=True)
class _Seen:
    """What one layer was given, and how near what it gave is."""

    layer: Float8Linear
    x: Tensor | None = None
    grad: Tensor | None = None
    asked: bool = False
    figures: dict[str, float] = field(default_factory=dict)


def check_layers(model: nn.Module, run: Callable[[], Tensor], least_db: float) -> Decision:
    """Whether output, input gradient and weight gradient of each FP8 layer have enough SQNR.

    Output and input gradient are those that the layer gave in this pass. A weight gradient needs all rows, so that
    product is done again on the rows that were recorded.

    Args:
        model: Holds Float8Linear layers, not compiled.
        run: One forward pass; its loss is differentiated here.
        least_db: What each figure must reach.
    """
    seen = {name: _Seen(module) for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    _record(seen, run)
    worst, where, looked = float("inf"), "", 0
    for name, found in seen.items():
        if found.x is None or found.grad is None:
            continue
        looked += 1
        if found.asked and "input gradient" not in found.figures:
            # None came back, which is as far from it as zeros are.
            found.figures["input gradient"] = 0.0
        _weight_gradient(found, found.x, found.grad)
        for role, value in found.figures.items():
            # NaN is worse than any figure, and stays the worst.
            if worst == worst and not value >= worst:
                worst, where = value, f"{role} of {name}"
    if not looked:
        return Rejected("fp8 layers", "no FP8 layer was seen to run forward and backward")
    text = f"FP8 layers {worst:.1f} dB and better ({where}; {looked} of {len(seen)} looked at)"
    if not worst >= least_db:
        return Rejected("fp8 layers", f"{where} has {worst:.1f} dB, and {least_db:.1f} are needed")
    return Accepted("fp8 layers", text)


def _record(seen: dict[str, _Seen], run: Callable[[], Tensor]) -> None:
    """One pass, forward and backward, with hooks on each layer that are gone afterwards."""
    handles: list[Any] = []
    try:
        for found in seen.values():
            # Last before the layer and first after it: hooks of others are no part of the product.
            handles.append(found.layer.register_forward_pre_hook(_before(found), with_kwargs=True))
            handles.append(found.layer.register_forward_hook(_after(found), prepend=True, with_kwargs=True))
        run().backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()


def _before(seen: _Seen) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], Any]:
    def compare(grad: Tensor) -> None:
        if seen.grad is not None:
            _figure(seen, "input gradient", seen.grad.float() @ seen.layer.weight.detach().float(), _some_rows(grad))

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
        if seen.x is not None:
            return None
        # The gradient of an alias is what this layer gives alone, where others read the same tensor.
        (alias,) = (each.view_as(each) for each in (*args, *kwargs.values()))
        seen.asked = alias.requires_grad
        if seen.asked:
            alias.register_hook(compare)  # type: ignore[no-untyped-call]
        return ((alias,), {}) if args else ((), dict.fromkeys(kwargs, alias))

    return record


def _after(seen: _Seen) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
    def keep(grad: Tensor) -> None:
        seen.grad = _some_rows(grad)

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        # Inside of a checkpoint the first pass may be one without gradients.
        if seen.x is not None or not output.requires_grad:
            return
        seen.x = _some_rows(*args, *kwargs.values()).to(output.dtype)
        layer = seen.layer
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias.float()
            _figure(seen, "output", F.linear(seen.x.float(), layer.weight.float(), bias), _some_rows(output))
        output.register_hook(keep)  # type: ignore[no-untyped-call]

    return record


def _figure(seen: _Seen, role: str, exact: Tensor, got: Tensor) -> None:
    seen.figures[role] = sqnr_db(exact, got)


def _weight_gradient(seen: _Seen, x: Tensor, grad: Tensor) -> None:
    layer = seen.layer
    if not layer.weight.requires_grad:
        return
    weight = layer.weight.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        (got,) = torch.autograd.grad(float8_linear(x, weight, None, layer.float8), weight, grad)
    _figure(seen, "weight gradient", grad.float().t() @ x.float(), got)


def _some_rows(tensor: Tensor) -> Tensor:
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return rows[:: max(1, rows.shape[0] // ROWS)].clone()
