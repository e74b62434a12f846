"""Each FP8 layer against what it stands for, on what the model really gave it and got from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.validation.numerics import sqnr_db

ROWS = 256
"""Rows of activations looked at in each layer, evenly strided: what is kept of all layers stays far below a model."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A module of one tensor in and one out that runs in FP8, each row by itself.

    Attributes:
        module: Whose calls are recorded.
        weights: Name below the module to weight; none of them for a product of its own.
        exact: (x, *weights) to the output that it stands for.
        float8: (x, *weights) to the output, in FP8 as in the module.
        shared: Its input goes to others in the same call, so that its gradient alone is not to be seen.
    """

    module: nn.Module
    weights: Mapping[str, Tensor]
    exact: Callable[..., Tensor]
    float8: Callable[..., Tensor]
    shared: bool = False


@dataclass(slots=True)
class _Seen:
    """What one unit was given, and how near what it gave is."""

    unit: Unit
    x: Tensor | None = None
    grad: Tensor | None = None
    asked: bool = False
    figures: dict[str, float] = field(default_factory=dict)


def linear_units(model: nn.Module) -> dict[str, Unit]:
    """The FP8 linear layers of a model by name."""
    return {name: _linear(module) for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def check_layers(
    model: nn.Module, run: Callable[[], Tensor], least_db: float, units: Mapping[str, Unit] | None = None
) -> Decision:
    """Whether output, input gradient and weight gradients of each FP8 layer have enough SQNR.

    Output and input gradient are those that the unit gave in this pass. A weight gradient needs all rows, so that
    product is done again on the rows that were recorded.

    Args:
        model: Holds the layers, not compiled.
        run: One forward pass; its loss is differentiated here.
        least_db: What each figure must reach.
        units: What is looked at, by name; the Float8Linear layers if not given.
    """
    seen = {name: _Seen(unit) for name, unit in (linear_units(model) if units is None else units).items()}
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


def _linear(layer: Float8Linear) -> Unit:
    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, None if layer.bias is None else layer.bias.detach().to(weight.dtype))

    def float8(x: Tensor, weight: Tensor) -> Tensor:
        return layer.product(x, weight)

    return Unit(layer, {"": layer.weight}, exact, float8)


def _record(seen: Mapping[str, _Seen], run: Callable[[], Tensor]) -> None:
    """One pass, forward and backward, with hooks on each unit that are gone afterwards."""
    handles: list[Any] = []
    try:
        for found in seen.values():
            # Last before the layer and first after it: hooks of others are no part of the product.
            handles.append(found.unit.module.register_forward_pre_hook(_before(found), with_kwargs=True))
            handles.append(found.unit.module.register_forward_hook(_after(found), prepend=True, with_kwargs=True))
        run().backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()


def _before(seen: _Seen) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], Any]:
    def compare(grad: Tensor) -> None:
        if seen.x is not None and seen.grad is not None:
            x = seen.x.float().requires_grad_()
            (exact,) = _gradients(seen.unit.exact, x, _wide(seen.unit), [x], seen.grad.float())
            seen.figures["input gradient"] = sqnr_db(exact, _some_rows(grad))

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
        if seen.x is not None or seen.unit.shared:
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
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            exact = seen.unit.exact(seen.x.float(), *_wide(seen.unit))
            seen.figures["output"] = sqnr_db(exact, _some_rows(output))
        output.register_hook(keep)  # type: ignore[no-untyped-call]

    return record


def _weight_gradient(seen: _Seen, x: Tensor, grad: Tensor) -> None:
    trained = {name: each for name, each in seen.unit.weights.items() if each.requires_grad}
    if not trained:
        return
    names = list(seen.unit.weights)
    figures = []
    for function, wide in ((seen.unit.exact, True), (seen.unit.float8, False)):
        weights = [each.detach().float() if wide else each.detach() for each in seen.unit.weights.values()]
        wanted = [weights[names.index(name)].requires_grad_() for name in trained]
        figures.append(_gradients(function, x.float() if wide else x, weights, wanted, grad.float() if wide else grad))
    for name, exact, got in zip(trained, *figures, strict=True):
        seen.figures[f"weight gradient of {name}".removesuffix(" of ")] = sqnr_db(exact, got)


def _gradients(
    function: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor], wanted: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        return torch.autograd.grad(function(x, *weights), wanted, grad)


def _wide(unit: Unit) -> list[Tensor]:
    return [each.detach().float() for each in unit.weights.values()]


def _some_rows(tensor: Tensor) -> Tensor:
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return rows[:: max(1, rows.shape[0] // ROWS)].clone()
