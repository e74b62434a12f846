"""Compiled code that is replayed as a CUDA graph: one launch for a whole pass, made safe for an ordinary training loop.

A graph writes its results to the same memory each time. What the user may keep is therefore copied out: outputs after
each call, and gradients before they are accumulated. Without the second, accumulation over batches raises or is wrong:
https://github.com/pytorch/pytorch/issues/169545.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from kpt_lightning.candidates.compiled_call import compiled_call, forget
from kpt_lightning.candidates.inductor import Inductor
from kpt_lightning.precision.kernel_sizes import at_every_size, worth_kernels

_KIND = "graphed call"


class Graphed:
    """What a module calls in place of its forward pass: compiled code whose results outlive the next call."""

    def __init__(self, module: nn.Module, key: str) -> None:
        """Compile lazily; nothing runs before the first call."""
        self._module = module
        self._compiled = compiled_call(module, Inductor(key, cuda_graphs=True), _KIND)
        self._parameters = list(module.parameters())
        self._hooked: dict[Tensor, tuple[RemovableHandle, bool]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run; a parameter that is trained only since now gets its hook first."""
        for each in self._parameters:
            if each.requires_grad and each not in self._hooked:
                bare = each._backward_hooks is None
                self._hooked[each] = each.register_hook(_copy), bare  # type: ignore[no-untyped-call]
        # One launch replays all of them, so that kernels cost the host nothing.
        with at_every_size():
            return tree_map(_copy, self._compiled(*args, **kwargs))

    def release(self) -> None:
        """Take the hooks off again, and free the memory of the graphs."""
        for each, (handle, bare) in self._hooked.items():
            handle.remove()
            if bare and not each._backward_hooks:
                each._backward_hooks = None
        self._hooked.clear()
        forget(self._module, _KIND)


class GraphedWhereSmall:
    """A block that is replayed as a CUDA graph where launches take the time, and compiled as usual everywhere else.

    Else is: an input of so many elements that the device is busy all the time, for which copies would cost more than
    launches; evaluation; and a pass that is computed again in backward, in whose middle no graph can begin.
    """

    def __init__(self, module: nn.Module, key: str) -> None:
        """Compile lazily; nothing runs before the first call."""
        self._graphed = Graphed(module, key)
        self._compiled = compiled_call(module, Inductor(key))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one or the other, by the first input."""
        small = _is_small((*args, *kwargs.values())) and torch.is_grad_enabled() and not _is_recomputed()
        call: Callable[..., Any] = self._graphed if small else self._compiled
        return call(*args, **kwargs)

    def release(self) -> None:
        """As :meth:`Graphed.release`."""
        self._graphed.release()


def _is_small(inputs: Iterable[Any]) -> bool:
    first = next((each for each in inputs if isinstance(each, Tensor) and each.is_floating_point()), None)
    return first is not None and not worth_kernels(first)


def _is_recomputed() -> bool:
    """Whether this pass keeps nothing for backward, or is in it: activation checkpointing of either kind."""
    if torch._C._current_graph_task_id() != -1:
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _copy(item: Any) -> Any:
    return item.clone() if isinstance(item, Tensor) else item
