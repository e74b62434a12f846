"""Looking into the mask tensors that a model hands to attention: which of them say no more than "causal"."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


def causal_masks(run: Callable[[], Any]) -> list[bool]:
    """Run once, all of it in eager mode, and judge the mask of each attention call that has one.

    Args:
        run: Does a forward pass.

    Returns:
        In the order of the calls: whether the mask hides the future, all of it, and nothing else.
    """
    looking = _Looking()
    with torch.compiler.set_stance("force_eager"), looking:
        run()
    return looking.found


class _Looking(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            if mask is not None:
                self.found.append(is_causal_mask(mask))
        return func(*args, **kwargs)


def is_causal_mask(mask: Tensor) -> bool:
    """Whether a mask of (..., queries, keys), True or 0 where attended, is the causal one everywhere."""
    future = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype is torch.bool:
        return bool((mask == ~future).all())
    # Older models add -1e4 instead of the least number; its exponential is 0 all the same.
    return bool((mask.masked_fill(future, 0) == 0).all() and (mask.masked_fill(~future, -torch.inf) <= -1e4).all())
