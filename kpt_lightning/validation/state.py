"""Leaving no trace: what running a model changes is put back, bit for bit, without a copy of its weights."""

import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kpt_lightning.errors import KptError

# Slots that hold what is looked after by name, or what only candidates and users change.
_OWN_SLOTS = frozenset({"_parameters", "_buffers", "_modules", "training"})
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)


@contextmanager
def preserved(model: nn.Module, *, weights: bool = True) -> Iterator[None]:
    """Run the model inside; afterwards all but its weights is what it was.

    Put back: gradients (there are none inside), ``requires_grad``, train mode, buffers, attributes of modules (numbers,
    containers and tensors in them), and the random state of Python, NumPy, torch and each CUDA device. Weights are not
    copied: a model whose own forward or backward pass writes to them is found out.

    Args:
        model: On any device.
        weights: Whether writing to a parameter is an error; False where the caller puts them back.

    Raises:
        KptError: A parameter was written to.
    """
    with ExitStack() as undo:
        undo.callback(_rng())
        undo.callback(_flags(model))
        undo.callback(_buffers(model))
        undo.callback(_attributes(model))
        undo.callback(_gradients(model))
        versions = [(name, each, each._version) for name, each in model.named_parameters() if weights]
        yield
    for name, each, version in versions:
        if each._version != version:
            raise KptError(
                f"the model writes to its own parameter {name!r} in a forward or backward pass, so nothing can be "
                "tried on it without changing it. Train it with a plan by rules"
            )


def seed_all(seed: int) -> None:
    """Seed every generator that :func:`preserved` puts back."""
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _rng() -> Callable[[], None]:
    states = random.getstate(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()

    def restore() -> None:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return restore


def _gradients(model: nn.Module) -> Callable[[], None]:
    saved = [(each, each.grad) for each in model.parameters()]
    for each, _ in saved:
        each.grad = None

    def restore() -> None:
        for each, grad in saved:
            each.grad = grad

    return restore


def _flags(model: nn.Module) -> Callable[[], None]:
    training = [(module, module.training) for module in model.modules()]
    needs_grad = [(each, each.requires_grad) for each in model.parameters()]

    def restore() -> None:
        for module, flag in training:
            module.training = flag
        for each, flag in needs_grad:
            each.requires_grad_(flag)

    return restore


def _buffers(model: nn.Module) -> Callable[[], None]:
    saved = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    names = [(module, frozenset(module._buffers)) for module in model.modules()]

    def restore() -> None:
        for module, known in names:
            for name in set(module._buffers) - known:
                del module._buffers[name]
        for module, name, buffer, copy in saved:
            if buffer is not None and copy is not None:
                with torch.no_grad():
                    _write(buffer, copy)
            module._buffers[name] = buffer

    return restore


def _write(tensor: Tensor, copy: Tensor) -> None:
    if tensor.shape == copy.shape:
        tensor.detach().copy_(copy)
    else:
        tensor.data = copy


def _attributes(model: nn.Module) -> Callable[[], None]:
    saved = [(module, {name: _copy(value) for name, value in _plain(module)}) for module in model.modules()]

    def restore() -> None:
        for module, values in saved:
            for name in [name for name, _ in _plain(module) if name not in values]:
                del vars(module)[name]
            for name, back in values.items():
                vars(module)[name] = back()

    return restore


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if name not in _OWN_SLOTS]


def _copy(value: Any) -> Callable[[], Any]:
    """A function that gives the very object back, with the content that it has now."""
    if isinstance(value, Tensor):
        copy = value.detach().clone()

        def tensor() -> Tensor:
            if value._version != version:
                with torch.no_grad():
                    _write(value, copy)
            return value

        version = value._version
        return tensor
    if type(value) in _CONTAINERS:
        return _copy_container(value)
    return lambda: value


def _copy_container(value: Any) -> Callable[[], Any]:
    if isinstance(value, dict):
        items = {key: _copy(item) for key, item in value.items()}

        def mapping() -> Any:
            value.clear()
            value.update({key: back() for key, back in items.items()})
            return value

        return mapping
    if isinstance(value, set):
        members = set(value)

        def unordered() -> Any:
            value.clear()
            value.update(members)
            return value

        return unordered
    parts = [_copy(item) for item in value]

    def sequence() -> Any:
        value.clear()
        value.extend(back() for back in parts)
        return value

    return sequence
