"""A module that keeps its inputs alone for the backward pass and computes the rest again there."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputed:
    """Stands in ``vars(module)["forward"]``, so that class, parameters and state-dict keys of the module stay.

    ``torch.compile`` of the module traces through it: the recomputation is then part of the compiled graphs. Random
    numbers, such as of dropout, are drawn again as they were.
    """

    def __init__(self, module: nn.Module) -> None:
        """For the object whose forward pass it becomes."""
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass, checkpointed where gradients are asked for."""
        forward = type(self.module).forward
        if not torch.is_grad_enabled():
            return forward(self.module, *args, **kwargs)
        return checkpoint(forward, self.module, *args, use_reentrant=False, **kwargs)


def recompute(modules: Iterable[nn.Module]) -> None:
    """Change modules in place, each once."""
    for module in modules:
        vars(module)["forward"] = Recomputed(module)


def keep_again(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`recompute`."""
    for module in modules:
        if isinstance(vars(module).get("forward"), Recomputed):
            del vars(module)["forward"]
