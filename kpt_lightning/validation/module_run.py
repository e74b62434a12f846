"""One run of a module on given arguments: what it returns and the gradient of everything."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

from kpt_lightning.validation.draw import Arguments, floating_arguments, map_floating
from kpt_lightning.validation.state import seed_all


@dataclass(frozen=True, slots=True)
class ModuleRun:
    """What one run gave.

    Attributes:
        leaves: What was returned, flat; tensors detached.
        form: How ``leaves`` were nested.
        figures: Floating-point outputs and all gradients by name; None where no gradient flows.
        disturbed: Name of an input, or of a cotangent, that was changed in place; None where none was.
    """

    AGAIN: ClassVar[str] = " in a second backward pass"

    leaves: list[Any]
    form: TreeSpec
    figures: dict[str, Tensor | None]
    disturbed: str | None

    def tensors(self) -> list[Tensor]:
        """All tensors that were returned."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def finite(self) -> bool:
        """Whether no figure holds NaN or infinity."""
        return all(bool(each.isfinite().all()) for each in self.figures.values() if each is not None)

    def form_difference(self, other: "ModuleRun") -> str | None:
        """What differs between two returned values, numbers of floating-point tensors left aside."""
        if len(self.leaves) != len(other.leaves) or str(self.form) != str(other.form):
            return f"{len(other.leaves)} values are returned in another form than the module's {len(self.leaves)}"
        for index, (mine, theirs) in enumerate(zip(self.leaves, other.leaves, strict=True)):
            if reason := _leaf_difference(mine, theirs):
                return f"{_output_name(index, len(self.leaves))} {reason}"
        return None


def run_module(
    function: Callable[..., Any],
    parameters: Mapping[str, Tensor],
    arguments: Arguments,
    autocast: torch.dtype | None,
    seed: int,
    *,
    backward: bool = True,
    twice: bool = False,
) -> ModuleRun:
    """Run forward, and backward from random cotangents; no ``.grad`` is written.

    Args:
        function: A module or a function.
        parameters: Whose gradients are wanted, those that require one.
        arguments: Given as copies.
        autocast: Dtype of the autocast to run under, None for none, whatever surrounds the call.
        seed: Of torch's random state before the run, and of the cotangents.
        backward: Whether gradients are wanted.
        twice: Also go backward a second time through the same graph.
    """
    leaves = {name: each.detach().requires_grad_(backward) for name, each in floating_arguments(arguments).items()}
    # No leaf goes in: a module may change its input in place, and that is to be seen.
    remaining = iter(leaves.values())
    fed: Arguments = map_floating(lambda _: next(remaining).clone(), arguments)
    seed_all(seed)
    with torch.set_grad_enabled(backward), _autocast(arguments, parameters, autocast):
        returned = function(*fed[0], **fed[1])
    flat, form = tree_flatten(returned)
    figures = _outputs(flat)
    disturbed = None
    if backward:
        wanted = {f"gradient of {name}": leaf for name, leaf in leaves.items()}
        wanted |= {f"gradient of {name}": each for name, each in parameters.items() if each.requires_grad}
        gradients, disturbed = _gradients(flat, wanted, seed, twice)
        figures |= gradients
    for name, now in floating_arguments(fed).items():
        if not torch.equal(now, leaves[name]):
            disturbed = name
    return ModuleRun([_detached(leaf) for leaf in flat], form, figures, disturbed)


def _autocast(
    arguments: Arguments, parameters: Mapping[str, Tensor], dtype: torch.dtype | None
) -> AbstractContextManager[Any]:
    tensors = [*floating_arguments(arguments).values(), *parameters.values()]
    kind = tensors[0].device.type if tensors else "cpu"
    return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)


def _outputs(flat: list[Any]) -> dict[str, Tensor | None]:
    return {
        _output_name(index, len(flat)): leaf.detach().clone()
        for index, leaf in enumerate(flat)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def _gradients(
    flat: list[Any], wanted: dict[str, Tensor], seed: int, twice: bool
) -> tuple[dict[str, Tensor | None], str | None]:
    """The gradients, and whether a cotangent was changed in place."""
    outputs = [leaf for leaf in flat if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not outputs or not wanted:
        return dict.fromkeys(wanted), None
    cotangents = [_cotangent(each, seed + 1 + index) for index, each in enumerate(outputs)]
    kept = [each.clone() for each in cotangents]
    figures: dict[str, Tensor | None] = {}
    for suffix in ("", ModuleRun.AGAIN) if twice else ("",):
        retain = twice and not suffix
        found = torch.autograd.grad(outputs, list(wanted.values()), kept, retain_graph=retain, allow_unused=True)
        figures |= {name + suffix: each for name, each in zip(wanted, found, strict=True)}
    same = all(torch.equal(before, after) for before, after in zip(cotangents, kept, strict=True))
    return figures, None if same else "incoming gradient"


def _cotangent(output: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(output.device).manual_seed(seed)
    values = torch.randn(output.shape, generator=generator, device=output.device)
    # bf16 values are exact in every dtype that an output may have.
    return values.bfloat16().to(output.dtype)


def _leaf_difference(mine: Any, theirs: Any) -> str | None:
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        if mine.dtype is not theirs.dtype:
            return f"is {theirs.dtype}, not {mine.dtype}"
        if mine.shape != theirs.shape:
            return f"has shape {tuple(theirs.shape)}, not {tuple(mine.shape)}"
        if not mine.is_floating_point() and not torch.equal(mine, theirs):
            return "has other values"
        return None
    if type(mine) is not type(theirs):
        return f"is a {type(theirs).__name__}, not a {type(mine).__name__}"
    if isinstance(mine, bool | int | float | str) and mine != theirs:
        return f"is {theirs!r}, not {mine!r}"
    return None


def _output_name(index: int, count: int) -> str:
    return "output" if count == 1 else f"output {index}"


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
