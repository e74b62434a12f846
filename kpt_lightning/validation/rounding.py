"""How much rounding alone moves a model's numbers: Monte Carlo arithmetic on the outputs of its modules.

Parker, Monte Carlo Arithmetic, 1997 (https://web.cs.ucla.edu/~stott/mca/): each result is perturbed at random by at
most half a unit in the last place, and the spread of the end result shows how far two correct programs may be apart.
"""

from collections.abc import Callable, Iterator
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


def _noisy(item: Any, shaken: Callable[[Tensor], Tensor]) -> Any:
    if not isinstance(item, Tensor) or not item.is_floating_point():
        return item
    result = item + shaken(item)
    if result.requires_grad:
        result.register_hook(lambda grad: grad + shaken(grad))  # type: ignore[no-untyped-call]
    return result
