"""Recording how each module is called: sizes, dtypes and modes, without keeping activations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kpt_lightning.validation.compiled import run_uncompiled


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its data.

    Attributes:
        shape: Sizes.
        dtype: Its dtype.
        device: Its device.
        requires_grad: Whether a gradient flows through it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """Of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        args: Positional arguments; floating-point tensors as :class:`TensorSpec`, integer and bool tensors cloned.
        kwargs: Keyword arguments, likewise.
        output: What it returned, every tensor as a :class:`TensorSpec`.
        autocast: The autocast dtype, None without autocast.
        training: The module's mode.
        count: How often the module was called in the pass.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    autocast: torch.dtype | None
    training: bool
    count: int = 1


def record_calls(model: nn.Module, run: Callable[[], Any]) -> dict[str, ModuleCall]:
    """Run once, without compilation, and record the first call of each module of ``model``.

    Args:
        model: Whose modules are watched, itself under the name "".
        run: Does one forward pass (and more, as it likes).

    Returns:
        Module name to call, for modules that were called.
    """
    calls: dict[str, ModuleCall] = {}
    with run_uncompiled(), _watched(model, calls):
        run()
    return calls


@contextmanager
def _watched(model: nn.Module, calls: dict[str, ModuleCall]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(_recorder(name, calls), with_kwargs=True) for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(name: str, calls: dict[str, ModuleCall]) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        known = calls.get(name)
        if known is not None:
            calls[name] = ModuleCall(
                known.args, known.kwargs, known.output, known.autocast, known.training, known.count + 1
            )
            return
        kind = _device_type(args, kwargs, output)
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        calls[name] = ModuleCall(
            tree_map(_keep, args), tree_map(_keep, kwargs), tree_map(_describe, output), autocast, module.training
        )

    return record


def _keep(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return item
    return TensorSpec.of(item) if item.is_floating_point() else item.detach().clone()


def _describe(item: Any) -> Any:
    return TensorSpec.of(item) if isinstance(item, Tensor) else item


def _device_type(*trees: Any) -> str:
    found: list[str] = []
    for tree in trees:
        tree_map(lambda item: found.append(item.device.type) if isinstance(item, Tensor) else None, tree)
    return found[0] if found else "cpu"
