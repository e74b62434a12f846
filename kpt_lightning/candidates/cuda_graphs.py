"""Compiled code that is replayed as a CUDA graph: one launch for a whole pass, made safe for an ordinary training loop.

A graph writes its results to the same memory each time. What the user may keep is therefore copied out: outputs after
each call, and gradients before they are accumulated. Without the second, accumulation over batches raises or is wrong:
https://github.com/pytorch/pytorch/issues/169545.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from kpt_lightning.candidates.compiled_call import compiled_call


@dataclass(frozen=True, slots=True)
class CudaGraphs:
    """A backend for ``torch.compile`` as ``mode="reduce-overhead"``, under a key as ``candidates.inductor.Inductor``.

    Attributes:
        key: Any text.
    """

    key: str

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph."""
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, list(inputs), config_patches={"triton.cudagraphs": True})  # type: ignore[return-value,unused-ignore]


class Graphed:
    """What a module calls in place of its forward pass: compiled code whose results outlive the next call."""

    def __init__(self, module: nn.Module, key: str) -> None:
        """Compile lazily; nothing runs before the first call."""
        self._compiled = compiled_call(module, CudaGraphs(key))
        self._parameters = list(module.parameters())
        self._hooked: dict[Tensor, tuple[RemovableHandle, bool]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run; a parameter that is trained only since now gets its hook first."""
        for each in self._parameters:
            if each.requires_grad and each not in self._hooked:
                bare = each._backward_hooks is None
                self._hooked[each] = each.register_hook(_copy), bare  # type: ignore[no-untyped-call]
        return tree_map(_copy, self._compiled(*args, **kwargs))

    def release(self) -> None:
        """Take the hooks off again."""
        for each, (handle, bare) in self._hooked.items():
            handle.remove()
            if bare and not each._backward_hooks:
                each._backward_hooks = None
        self._hooked.clear()


def _copy(item: Any) -> Any:
    return item.clone() if isinstance(item, Tensor) else item
