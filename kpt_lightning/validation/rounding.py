"""How much rounding alone moves a model's numbers: Monte Carlo arithmetic on the outputs of its modules.

Parker, Monte Carlo Arithmetic, 1997 (https://web.cs.ucla.edu/~stott/mca/): each result is perturbed at random by at
most half a unit in the last place, and the spread of the end result shows how far two correct programs may be apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@contextmanager
def rounding_noise(model: nn.Module, compute_dtype: torch.dtype) -> Iterator[None]:
    """Perturb the output of each module without children, forward, and its gradient, backward.

    Args:
        model: Restored afterwards.
        compute_dtype: In which its products run: half a unit of it at most is added, relative to each element.
    """

    def perturb(module: nn.Module, args: Any, output: Any) -> Any:
        return tree_map(lambda item: _noisy(item, compute_dtype), output)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(perturb) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noisy(item: Any, compute_dtype: torch.dtype) -> Any:
    if not isinstance(item, Tensor) or not item.is_floating_point():
        return item
    coarse = max(torch.finfo(item.dtype).eps, torch.finfo(compute_dtype).eps)

    def shaken(tensor: Tensor) -> Tensor:
        noise = torch.rand_like(tensor, dtype=torch.float32).mul_(2).sub_(1)
        return (tensor.detach() * noise.mul_(coarse / 2)).to(tensor.dtype)

    result = item + shaken(item)
    if result.requires_grad:
        result.register_hook(lambda grad: grad + shaken(grad))  # type: ignore[no-untyped-call]
    return result
