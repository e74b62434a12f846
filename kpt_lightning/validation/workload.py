"""One unit of training work: how a batch goes into a model, and where its loss comes out."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kpt_lightning.errors import ConfigError, KptError

LossFunction = Callable[..., Any]


class ModelOutputError(KptError, TypeError):
    """What came back from a model or a loss function is no loss."""


class Workload:
    """A model, one batch, and the loss that it gives.

    The batch is fed as ``model(**batch)`` where it is a mapping, ``model(*batch)`` where it is a tuple or list, else
    ``model(batch)``. The loss is ``.loss`` or ``["loss"]`` of what comes back, or what comes back itself where it is a
    scalar. With a ``loss_fn`` of ``torch.nn`` or ``torch.nn.functional`` the batch is ``(inputs, target)`` and the loss
    ``loss_fn(model(inputs), target)``; any other is called as ``loss_fn(model, batch)``.

    Attributes:
        model: Called in the mode that it is in.
        batch: Any pytree, on the device of the model.
        loss_fn: As above, None where the model itself gives a loss.
    """

    def __init__(self, model: nn.Module, batch: Any, loss_fn: LossFunction | None = None) -> None:
        """Nothing runs yet.

        Raises:
            ConfigError: The batch is none, or does not fit the form that ``loss_fn`` asks for.
        """
        self.model, self.batch, self.loss_fn = model, batch, loss_fn
        self._parted = loss_fn is not None and _is_torch_loss(loss_fn)
        _check_batch(batch)
        if self._parted and not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise ConfigError(
                "batch", _shape(batch), f"must be (inputs, target) for {_name(loss_fn)}",
                "Give two parts, or a loss_fn of your own that is called as loss_fn(model, batch)",
            )  # fmt: skip

    def loss(self) -> Tensor:
        """One forward pass.

        Returns:
            A scalar that a gradient flows through, unless gradients are switched off around the call.

        Raises:
            ModelOutputError: What came back is no scalar tensor, or no gradient flows through it.
        """
        return self._run([])

    def loss_and_outputs(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward pass with what the model returned.

        Returns:
            The loss, and the floating-point tensors of the model's last output by their place in it, such as
            "logits" or "0.hidden"; detached. None are seen where ``loss_fn`` calls methods of the model but never
            the model itself, or a model that was compiled as a whole before.

        Raises:
            ModelOutputError: As :meth:`loss`.
        """
        seen: list[Any] = []
        if self.loss_fn is None or self._parted:
            loss = self._run(seen)
        else:
            handle = self.model.register_forward_hook(lambda _module, _args, output: _keep_last(seen, output))
            try:
                loss = self._run([])
            finally:
                handle.remove()
        return loss, dict(floating_tensors(seen[-1])) if seen else {}

    def outputs(self) -> dict[str, Tensor]:
        """The tensors of :meth:`loss_and_outputs` from one forward pass without gradient."""
        with torch.no_grad():
            return self.loss_and_outputs()[1]

    def _run(self, seen: list[Any]) -> Tensor:
        if self.loss_fn is None:
            output = feed(self.model, self.batch)
            seen.append(output)
            return _loss_of(output, "the model")
        if self._parted:
            inputs, target = self.batch
            output = feed(self.model, inputs)
            seen.append(output)
            return _loss_of(self.loss_fn(output, target), _name(self.loss_fn))
        return _loss_of(self.loss_fn(self.model, self.batch), _name(self.loss_fn))


def feed(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: by name for a mapping, by position for a tuple or list, else as its one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def floating_tensors(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of :func:`named_tensors`, detached."""
    for place, tensor in named_tensors(tree):
        if tensor.is_floating_point():
            yield place or "output", tensor.detach()


def named_tensors(tree: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a nest of mappings, tuples, lists and dataclasses, each with its place, such as "0.hidden"."""
    if isinstance(tree, Tensor):
        yield place, tree
        return
    parts: list[tuple[Any, Any]] = []
    if isinstance(tree, Mapping):
        parts = list(tree.items())
    elif isinstance(tree, tuple | list):
        parts = list(enumerate(tree))
    elif is_dataclass(tree) and not isinstance(tree, type):
        parts = [(field.name, getattr(tree, field.name)) for field in fields(tree)]
    for key, part in parts:
        yield from named_tensors(part, f"{place}.{key}" if place else str(key))


def _keep_last(seen: list[Any], output: Any) -> None:
    seen[:] = [output]


def _is_torch_loss(loss_fn: LossFunction) -> bool:
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    if isinstance(loss_fn, nn.modules.loss._Loss):
        return True
    owner = type(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
    return str(getattr(owner, "__module__", "")).startswith("torch.nn")


def _check_batch(batch: Any) -> None:
    if batch is None:
        raise ConfigError("batch", None, "is no batch", "Pass one batch, such as next(iter(loader))")
    if isinstance(batch, Iterator | DataLoader | Dataset):
        rule = "gives batches and is none itself" if isinstance(batch, DataLoader) else "is no batch"
        raise ConfigError("batch", type(batch).__name__, rule, "Pass one batch, such as next(iter(loader))")


def _loss_of(result: Any, source: str) -> Tensor:
    if isinstance(result, Mapping) and "loss" in result:
        loss, what = result["loss"], f"the 'loss' that {source} returned"
    elif not isinstance(result, Tensor) and hasattr(result, "loss"):
        loss, what = result.loss, f"the .loss that {source} returned"
    else:
        loss, what = result, f"what {source} returned"
    if loss is None and result is not None:
        raise ModelOutputError(f"{what} is None. Put the target into the batch (such as labels), or pass loss_fn")
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        raise ModelOutputError(f"{what} is {_shape(loss)}, no scalar loss. Return a scalar, or pass loss_fn")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ModelOutputError(
            f"no gradient flows through {what}. Leave at least one parameter with requires_grad=True, and neither "
            "detach the loss nor compute it under torch.no_grad()"
        )
    return loss


def _name(loss_fn: Any) -> str:
    return str(getattr(loss_fn, "__qualname__", type(loss_fn).__name__))


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"
