"""How much rounding alone moves a model's numbers: Monte Carlo arithmetic on the outputs of its modules.

Parker, Monte Carlo Arithmetic, 1997 (https://web.cs.ucla.edu/~stott/mca/): each result is perturbed at random by at
most half a unit in the last place, and the spread of the end result shows how far two correct programs may be apart.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kpt_lightning.validation.compiled import run_uncompiled


@contextmanager
def rounding_noise(model: nn.Module, compute_dtype: torch.dtype, *, seed: int = 0) -> Iterator[None]:
    """Perturb the output of each module without children, forward, and its gradient, backward.

    Inside, compiled code runs as Python, for noise cannot reach into it. The model's own random draws are the same as
    without noise.

    Args:
        model: Restored afterwards.
        compute_dtype: In which its products run: half a unit of it at most is added, relative to each element.
        seed: Another one gives other noise.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def generator(device: torch.device) -> torch.Generator:
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        return generators[device]

    def shaken(tensor: Tensor) -> Tensor:
        coarse = max(torch.finfo(tensor.dtype).eps, torch.finfo(compute_dtype).eps)
        noise = torch.empty_like(tensor, dtype=torch.float32).uniform_(-1, 1, generator=generator(tensor.device))
        return (tensor.detach() * noise.mul_(coarse / 2)).to(tensor.dtype)

    def perturb(module: nn.Module, args: Any, output: Any) -> Any:
        return tree_map(lambda item: _noisy(item, shaken), output)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(perturb) for module in leaves]
    try:
        with run_uncompiled():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def format_noise(layers: Sequence[nn.Linear], forward: float, backward: float, *, seed: int = 0) -> Iterator[None]:
    """Let the three products of each layer see operands that a coarser format would give: each element moved at random.

    No weight is copied for longer than its product takes: backward draws the same noise again.

    Args:
        layers: Linear layers; as many as will run in the format.
        forward: At most this part of an element of input and weight, such as 2^-4 for e4m3.
        backward: Likewise of the output gradient.
        seed: Another one gives other noise.
    """

    def coarse(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        def replaced(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            (x,) = (*args, *kwargs.values())
            out: Tensor = _CoarseProducts.apply(  # type: ignore[no-untyped-call]
                x, module.weight, output.dtype, forward, backward, 1000 * seed + 3 * number
            )
            return out if module.bias is None else out + module.bias.to(output.dtype)  # type: ignore[operator]

        return replaced

    handles = [
        layer.register_forward_hook(coarse(number), prepend=True, with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    try:
        with run_uncompiled():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _CoarseProducts(torch.autograd.Function):
    """(..., K) @ (N, K)^T with noisy operands in all three products."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, ahead: float, back: float, seed: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.noise = dtype, ahead, back, seed
        with torch.autocast(x.device.type, enabled=False):
            return _moved(x.to(dtype), ahead, seed) @ _moved(weight.to(dtype), ahead, seed + 1).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dtype, ahead, back, seed = ctx.noise
        grad, into, own = _moved(grads[0], back, seed + 2), None, None
        if ctx.needs_input_grad[0]:
            into = (grad @ _moved(weight.to(dtype), ahead, seed + 1)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = _moved(x.to(dtype), ahead, seed).reshape(-1, x.shape[-1])
            own = (grad.reshape(-1, grad.shape[-1]).t() @ rows).to(weight.dtype)
        return into, own, None, None, None, None


def _moved(tensor: Tensor, most: float, seed: int) -> Tensor:
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return torch.empty_like(tensor).uniform_(1 - most, 1 + most, generator=generator).mul_(tensor)


def _noisy(item: Any, shaken: Callable[[Tensor], Tensor]) -> Any:
    if not isinstance(item, Tensor) or not item.is_floating_point():
        return item
    result = item + shaken(item)
    if result.requires_grad:
        result.register_hook(lambda grad: grad + shaken(grad))  # type: ignore[no-untyped-call]
    return result
