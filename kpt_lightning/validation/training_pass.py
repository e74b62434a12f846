"""One forward and backward pass watched: the loss, each gradient's size, and what each layer gave."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kpt_lightning.validation.state import preserved
from kpt_lightning.validation.weights import extremes
from kpt_lightning.validation.workload import Workload, floating_tensors

# Fewer values than this are all zero by chance.
_FEW = 32


@dataclass(slots=True)
class Layer:
    """What went through one module without children, over all its calls.

    Attributes:
        kind: Name of its class.
        outputs: How many values it gave.
        zero: Whether every output was zero.
        fed: Whether some input was not zero.
        finite: Whether every output was finite.
    """

    kind: str
    outputs: int = 0
    zero: bool = True
    fed: bool = False
    finite: bool = True


@dataclass(slots=True)
class TrainingPass:
    """What one pass showed.

    Attributes:
        stage: How far it came: "forward", "backward" or "done".
        loss: Its value, NaN before the forward pass ended.
        called: Names of the modules that were called; those inside a compiled one are not seen.
        layers: Modules without children that were called, in that order.
        norms: Trainable parameter to the Euclidean norm of its gradient, None where it got none.
    """

    stage: str = "forward"
    loss: float = math.nan
    called: set[str] = field(default_factory=set)
    layers: dict[str, Layer] = field(default_factory=dict)
    norms: dict[str, float | None] = field(default_factory=dict)

    @property
    def silent(self) -> list[str]:
        """Layers that gave nothing but zeros for an input that was not zero."""
        return [
            f"{name} ({layer.kind})"
            for name, layer in self.layers.items()
            if layer.zero and layer.fed and layer.outputs >= _FEW
        ]

    @property
    def first_not_finite(self) -> str | None:
        """The first layer in the order of calls that gave a NaN or an infinity."""
        return next((f"{name} ({layer.kind})" for name, layer in self.layers.items() if not layer.finite), None)


def watch(work: Workload, seen: TrainingPass) -> None:
    """Run once, forward and backward; the model is afterwards as before.

    Args:
        work: What to run, in the mode that the model is in.
        seen: Filled as far as the pass comes, also where it raises.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved(work.model))
        for handle in _hooks(work.model, seen):
            stack.callback(handle.remove)
        loss = work.loss()
        seen.loss = float(loss.detach())
        seen.stage = "backward"
        torch.autograd.backward(loss)
        for name, parameter in work.model.named_parameters():
            if parameter.requires_grad:
                seen.norms[name] = None if parameter.grad is None else norm(parameter.grad)
        seen.stage = "done"


def norm(tensor: Tensor) -> float:
    """Euclidean norm in double precision: NaN or infinite just where an element is."""
    plain = tensor.detach()
    if plain.layout is torch.sparse_coo:
        plain = plain.coalesce().values()
    if hasattr(plain, "to_local"):
        plain = plain.to_local()
    return float(torch.linalg.vector_norm(plain, dtype=torch.complex128 if plain.is_complex() else torch.float64))


def _hooks(model: nn.Module, seen: TrainingPass) -> Iterator[Any]:
    for name, module in _outside_compiled("", model):
        yield module.register_forward_hook(_note(name, seen), with_kwargs=True)


def _outside_compiled(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those inside a compiled one: a hook there would stay in the compiled code."""
    if module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule):
        return
    yield name, module
    for child, below in module.named_children():
        yield from _outside_compiled(f"{name}.{child}" if name else child, below)


def _note(name: str, seen: TrainingPass) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.called.add(name)
        if any(True for _ in module.children()):
            return
        layer = seen.layers.setdefault(name, Layer(type(module).__name__))
        for _, tensor in floating_tensors(output):
            found = extremes(tensor)
            if found is None:
                continue
            layer.outputs += tensor.numel()
            layer.finite &= all(math.isfinite(value) for value in found)
            if found != (0.0, 0.0):
                layer.zero = False
            elif not layer.fed:
                # Zero weights give zeros by design: LoRA and zero-initialised branches begin so.
                begins = _all_zero(dict(module.named_parameters(recurse=False)))
                layer.fed = not begins and not _all_zero((args, kwargs))

    return note


def _all_zero(tree: Any) -> bool:
    """Whether all floating-point tensors in it are zero; no tensor, such as for token ids, is not zero."""
    tensors = [tensor for _, tensor in floating_tensors(tree)]
    return bool(tensors) and all(extremes(tensor) in ((0.0, 0.0), None) for tensor in tensors)
