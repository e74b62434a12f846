"""Leaving no trace: what running a model changes is put back, bit for bit, without a copy of its weights."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from kpt_lightning.errors import KptError
from kpt_lightning.validation.reachable import survey
from kpt_lightning.validation.written import place, watch

_SURROUNDINGS: ContextVar[tuple[object, ...]] = ContextVar("surroundings", default=())


@contextmanager
def surrounded_by(*others: object) -> Iterator[None]:
    """Inside, every :func:`preserved` looks after these as after the model: a loss module, a batch, more parameters.

    Args:
        others: Modules, tensors, or containers of them.
    """
    token = _SURROUNDINGS.set((*_SURROUNDINGS.get(), *others))
    try:
        yield
    finally:
        _SURROUNDINGS.reset(token)


@contextmanager
def preserved(model: nn.Module, *, weights: bool = True) -> Iterator[None]:
    """Run the model inside; afterwards all but its weights is what it was.

    Put back: gradients (there are none inside), ``requires_grad``, train mode, buffers, classes and attributes of
    modules with all that ``validation.reachable.survey`` finds in them, the same of what :func:`surrounded_by` names,
    and the random state of Python, NumPy, torch and each CUDA device. Weights are not copied: a model whose own forward
    or backward pass writes to them is found out, by their version counters and, for writes through ``.data``, by a few
    elements of each.

    Args:
        model: On any device.
        weights: Whether writing to a parameter is an error; False where the caller puts them back.

    Raises:
        KptError: A parameter was written to, or has no size yet.
    """
    _refuse_lazy(model)
    with ExitStack() as undo:
        undo.callback(_rng())
        found = survey(model, *_SURROUNDINGS.get())
        leaves = [*found.parameters, *(each for each in found.tensors if each.is_leaf and each.requires_grad)]
        for back in found.restore:
            undo.callback(back)
        undo.callback(_classes(found.modules))
        undo.callback(_flags(leaves))
        aliases, own = _split(found.tensors, found.parameters)
        for each in own:
            undo.callback(_content(each))
        undo.callback(_gradients(leaves))
        written = watch([*found.parameters, *aliases] if weights else [])
        yield
    if (changed := written()) is not None:
        raise KptError(
            f"the model writes to its own {_name(model, changed)} in a forward or backward pass, so nothing can be "
            "tried on it without changing it. Train it with a plan by rules"
        )


def seed_all(seed: int) -> None:
    """Seed every generator that :func:`preserved` puts back."""
    random.seed(seed)
    # torch.manual_seed would also seed devices that are not in use, at their first use.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _refuse_lazy(model: nn.Module) -> None:
    for name, each in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(each):
            raise KptError(
                f"{name!r} has no size before the first forward pass, which would make it. Run the model once before"
            )


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


def _classes(modules: Sequence[nn.Module]) -> Callable[[], None]:
    saved = [(each, type(each)) for each in modules]

    def restore() -> None:
        for each, kind in saved:
            if type(each) is not kind:
                each.__class__ = kind

    return restore


def _gradients(leaves: Sequence[Tensor]) -> Callable[[], None]:
    saved = [(each, each.grad) for each in leaves]
    for each, _ in saved:
        each.grad = None

    def restore() -> None:
        for each, grad in saved:
            each.grad = grad

    return restore


def _flags(leaves: Sequence[Tensor]) -> Callable[[], None]:
    saved = [(each, each.requires_grad) for each in leaves]

    def restore() -> None:
        for each, flag in saved:
            each.requires_grad_(flag)

    return restore


def _split(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Other names of a weight's memory, which need no copy, and tensors with content of their own."""
    weights = {memory for each in parameters if (memory := place(each))}
    aliases = [each for each in tensors if place(each) in weights]
    return aliases, [each for each in tensors if place(each) not in weights and not _fixed(each)]


def _fixed(tensor: Tensor) -> bool:
    """Without data, or made in inference mode: nothing outside of it can write there."""
    return tensor.is_meta or tensor.is_inference()


def _content(tensor: Tensor) -> Callable[[], None]:
    copy, version, shape = _elements(tensor).detach().clone(), tensor._version, tensor.shape

    def restore() -> None:
        now = _elements(tensor)
        if now.shape != copy.shape or now.dtype != copy.dtype:
            tensor.data = copy.expand(shape)
        elif tensor._version != version or not _equal(now, copy):
            with torch.no_grad():
                now.copy_(copy)

    return restore


def _elements(tensor: Tensor) -> Tensor:
    """Each element once: expanded dimensions, which cannot be written to, as one."""
    if tensor.layout is not torch.strided:
        # Detached, its parts could be replaced without the tensor's knowledge.
        return tensor
    plain = tensor.detach()
    if type(plain) is Tensor:
        for dim, stride in enumerate(plain.stride()):
            if stride == 0 and plain.shape[dim] > 1:
                plain = plain.narrow(dim, 0, 1)
    return plain


def _equal(now: Tensor, before: Tensor) -> bool:
    """Past the version counter, which a write through ``.data`` does not move. A needless write would move it."""
    if now.layout is not torch.strided:
        # Its values have a counter of their own.
        return False
    return type(now) is not Tensor or torch.equal(now, before)


def _name(model: nn.Module, tensor: Tensor) -> str:
    memory = place(tensor)
    names = [name for name, each in model.named_parameters() if each is tensor or (memory and place(each) == memory)]
    return f"parameter {names[0]!r}" if names else f"hidden parameter of shape {tuple(tensor.shape)}"
