"""Each FP8 layer against itself in high precision, on the activations and gradients that the model really gives it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.precision.float8_linear import Float8Linear, float8_linear
from kpt_lightning.validation.numerics import sqnr_db

ROWS = 4096
"""Rows of activations kept of each layer, evenly strided."""


@dataclass(slots=True)
class _Seen:
    x: Tensor | None = None
    grad: Tensor | None = None


def check_layers(model: nn.Module, run: Callable[[], Tensor], least_db: float) -> Decision:
    """Whether output, input gradient and weight gradient of FP8 layers have enough SQNR.

    Of layers of one size the first and the last are looked at. Their products are done again on what was recorded: in
    FP8, and in fp32 from the same bf16 operands.

    Args:
        model: Holds Float8Linear layers, not compiled.
        run: One forward pass; its loss is differentiated here.
        least_db: What each figure must reach.
    """
    chosen = _ends_of_each_size(model)
    seen = _record(chosen, run)
    worst, where, looked = float("inf"), "", 0
    for name, layer in chosen:
        found = seen[name]
        if found.x is None or found.grad is None:
            continue
        looked += 1
        for role, value in _figures(layer, found.x, found.grad).items():
            # NaN is worse than any figure, and stays the worst.
            if worst == worst and not value >= worst:
                worst, where = value, f"{role} of {name}"
    if not looked:
        return Rejected("fp8 layers", "no FP8 layer was seen to run forward and backward")
    text = f"FP8 layers {worst:.1f} dB and better ({where}; {looked} looked at)"
    if not worst >= least_db:
        return Rejected("fp8 layers", f"{where} has {worst:.1f} dB, and {least_db:.1f} are needed")
    return Accepted("fp8 layers", text)


def _ends_of_each_size(model: nn.Module) -> list[tuple[str, Float8Linear]]:
    groups: dict[tuple[int, int], list[tuple[str, Float8Linear]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Float8Linear):
            groups.setdefault((module.out_features, module.in_features), []).append((name, module))
    return [each for group in groups.values() for each in (group[:1] if len(group) == 1 else [group[0], group[-1]])]


def _record(chosen: Sequence[tuple[str, Float8Linear]], run: Callable[[], Tensor]) -> dict[str, _Seen]:
    seen = {name: _Seen() for name, _ in chosen}
    handles = [layer.register_forward_hook(_recorder(seen[name]), with_kwargs=True) for name, layer in chosen]
    try:
        run().backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _recorder(seen: _Seen) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        if seen.x is None and output.requires_grad:
            seen.x = _some_rows(*args, *kwargs.values())
            output.register_hook(lambda grad: setattr(seen, "grad", _some_rows(grad)))  # type: ignore[no-untyped-call]

    return record


def _some_rows(tensor: Tensor) -> Tensor:
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return rows[:: max(1, rows.shape[0] // ROWS)].clone()


def _figures(layer: Float8Linear, x: Tensor, grad: Tensor) -> dict[str, float]:
    """SQNR of the three products, in dB."""
    x = x.to(grad.dtype)
    exact = _products(x, grad, layer, lambda a, w: torch.nn.functional.linear(a.float(), w.float()))
    got = _products(x, grad, layer, lambda a, w: float8_linear(a, w, None, layer.float8))
    return {role: sqnr_db(exact[role], got[role]) for role in exact if bool(exact[role].any())}


def _products(
    x: Tensor, grad: Tensor, layer: Float8Linear, multiply: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    with torch.enable_grad():
        a = x.detach().requires_grad_()
        weight = layer.weight.detach().to(grad.dtype).requires_grad_()
        with torch.autocast(x.device.type, enabled=False):
            out = multiply(a, weight)
            grads = torch.autograd.grad(out, [a, weight], grad.to(out.dtype))
    return {"output": out.detach(), "input gradient": grads[0], "weight gradient": grads[1]}
