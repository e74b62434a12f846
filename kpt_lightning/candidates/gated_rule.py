"""Gated MLPs, found by running them: ``down(act(gate(x)) * up(x))``, whatever its layers are called."""

import copy
import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpt_lightning.precision.convert import restore_linear
from kpt_lightning.validation.attempt import Failure, attempt
from kpt_lightning.validation.calls import ModuleCall, TensorSpec
from kpt_lightning.validation.numerics import relative_error
from kpt_lightning.validation.state import preserved

# fp32 arithmetic with another order of operations stays below; two forms of GELU are 5e-4 apart.
_SAME = 1e-5

_Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, _Activation] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
}
"""Activations that can be told apart, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedRule:
    """``down(activation(gate(x)) * up(x))``.

    Attributes:
        gate: Name of the layer whose result goes through the activation.
        up: Name of the layer that it is multiplied by.
        down: Name of the layer that reads the product.
        activation: A key of :data:`ACTIVATIONS`.
    """

    gate: str
    up: str
    down: str
    activation: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-like data, for ``GatedRule(**data)``."""
        return asdict(self)


def projections(module: nn.Module) -> list[str]:
    """Names of the three layers with weights of a module that looks like a gated MLP.

    Returns:
        Empty where it does not: with weights of its own, or other than three such children.
    """
    own = any(each is not None for each in (*module._parameters.values(), *module._buffers.values()))
    weighty = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    linear = all(_is_linear(module.get_submodule(name)) for name in weighty)
    return weighty if len(weighty) == 3 and linear and not own else []


def plain_twin(module: nn.Module) -> nn.Module:
    """A copy whose FP8 layers are plain: rounding to FP8 would hide what is to be compared."""
    twin = copy.deepcopy(module)
    restore_linear(each for each in twin.modules() if isinstance(each, nn.Linear))
    return twin


def find_gated(module: nn.Module, call: ModuleCall) -> GatedRule | str:
    """Find what a module with three :func:`projections` computes by running a copy on small random input.

    Args:
        module: Not changed.
        call: A recorded call of it.

    Returns:
        The rule, or why there is none.
    """
    given = [*call.args, *call.kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], TensorSpec) or not isinstance(call.output, TensorSpec):
        return f"it is called with {len(given)} arguments, not with one floating-point tensor"
    probe = attempt(lambda: _probe(module, given[0]))
    if isinstance(probe, Failure):
        return f"it does not run on other input: {probe.text}"
    return _roles(*probe.value)


@dataclass(frozen=True, slots=True)
class _Seen:
    """Calls of one projection: what went in and what came out."""

    inputs: list[Tensor]
    outputs: list[Tensor]


def _probe(module: nn.Module, spec: TensorSpec) -> tuple[Tensor, Tensor, dict[str, _Seen]]:
    twin = plain_twin(module).float()
    shape = (*(min(size, 2) for size in spec.shape[:-1]), spec.shape[-1])
    generator = torch.Generator(spec.device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=spec.device)
    seen = {name: _Seen([], []) for name in projections(twin)}
    with ExitStack() as stack:
        for name, record in seen.items():
            handle = twin.get_submodule(name).register_forward_hook(_recorder(record))
            stack.callback(handle.remove)
        stack.enter_context(preserved(twin))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(spec.device.type, enabled=False))
        out = twin(x)
    return x, out, seen


def _recorder(record: _Seen) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record.inputs.append(args[0].clone())
        record.outputs.append(output.clone())

    return note


def _roles(x: Tensor, out: Tensor, seen: dict[str, _Seen]) -> GatedRule | str:
    if any(len(record.inputs) != 1 for record in seen.values()):
        return "its three layers are not called once each"
    readers = [name for name, record in seen.items() if _equal(record.inputs[0], x)]
    rest = [name for name in seen if name not in readers]
    if len(readers) != 2 or not _equal(seen[rest[0]].outputs[0], out):
        return "no two of its layers read its input, with a third that gives its result"
    middle = seen[rest[0]].inputs[0]
    first, second = (seen[name].outputs[0] for name in readers)
    if first.shape != second.shape or first.shape != middle.shape:
        return "what its layers give is of different sizes"
    found = []
    for (gate, up), activation in itertools.product((tuple(readers), tuple(reversed(readers))), ACTIVATIONS):
        wanted = ACTIVATIONS[activation](seen[gate].outputs[0].double()) * seen[up].outputs[0].double()
        error = relative_error(wanted, middle)
        found.append((math.inf if math.isnan(error) else error, gate, up, activation))
    error, gate, up, activation = min(found)
    if error > _SAME:
        return f"no activation that is known here fits; the closest, {activation}, is off by {error:.1e}"
    return GatedRule(gate=gate, up=up, down=rest[0], activation=activation)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _is_linear(child: nn.Module) -> bool:
    """nn.Linear, and what stands in for it and says its sizes, as LoRA's and quantized layers do."""
    return isinstance(getattr(child, "in_features", None), int) and isinstance(
        getattr(child, "out_features", None), int
    )
