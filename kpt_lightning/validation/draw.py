"""Random arguments that look like those of a recorded call."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_map

from kpt_lightning.validation.calls import ModuleCall, TensorSpec

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments, and those by name."""

# A mean that is not zero: else a norm that subtracts it could not be told from one that does not.
_MEAN = 0.5

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def draw(call: ModuleCall, scale: float, seed: int) -> Arguments:
    """Random arguments of the recorded shapes and dtypes.

    Args:
        call: What was recorded; integer and bool tensors are taken as they are.
        scale: Floating-point tensors are normal with this standard deviation and half of it as mean.
        seed: The same seed gives the same values in every dtype, up to rounding.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def fill(item: Any) -> Any:
        if isinstance(item, TensorSpec):
            generator = generators.setdefault(item.device, torch.Generator(item.device).manual_seed(seed))
            values = torch.randn(item.shape, generator=generator, device=item.device)
            return values.add_(_MEAN).mul_(scale).to(item.dtype)
        return item.clone() if isinstance(item, Tensor) else item

    args, kwargs = tree_map(fill, (call.args, call.kwargs))
    return args, kwargs


def in_float32(call: ModuleCall) -> ModuleCall:
    """The same call with every floating-point tensor in float32, outside autocast."""

    def change(item: Any) -> Any:
        return replace(item, dtype=torch.float32) if isinstance(item, TensorSpec) else item

    args, kwargs, output = tree_map(change, (call.args, call.kwargs, call.output))
    return replace(call, args=args, kwargs=kwargs, output=output, autocast=None)


def in_float64(arguments: Arguments) -> Arguments:
    """The same values in float64; integer and bool tensors as they are."""
    return map_floating(Tensor.double, arguments)


def map_floating(change: Callable[[Tensor], Tensor], arguments: Arguments) -> Arguments:
    """Arguments with each floating-point tensor changed."""
    args, kwargs = tree_map(lambda item: change(item) if _is_floating(item) else item, arguments)
    return args, kwargs


def floating_arguments(arguments: Arguments) -> dict[str, Tensor]:
    """The floating-point tensors by a name to show, such as "input 0" or "input 'hidden_states'"."""
    leaves, _ = tree_flatten_with_path(arguments)
    return {_title(path): leaf for path, leaf in leaves if _is_floating(leaf)}


def floating_dtypes(call: ModuleCall) -> set[torch.dtype]:
    """Dtypes of the floating-point tensors that go in and out."""
    leaves, _ = tree_flatten((call.args, call.kwargs, call.output))
    return {leaf.dtype for leaf in leaves if isinstance(leaf, TensorSpec) and leaf.dtype.is_floating_point}


def foreign_argument(call: ModuleCall) -> str | None:
    """The type of an argument that is neither tensor nor plain value and may keep state, such as a cache; or None."""
    leaves, _ = tree_flatten_with_path((call.args, call.kwargs))
    kinds = (TensorSpec, Tensor, *_PLAIN)
    found = [type(leaf).__name__ for _, leaf in leaves if not isinstance(leaf, kinds)]
    return found[0] if found else None


def _is_floating(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()


def _title(path: tuple[Any, ...]) -> str:
    return "input " + keystr(path[1:]).removeprefix("[").replace("][", ".").removesuffix("]")
