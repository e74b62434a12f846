"""A forward pass on inputs that a model makes itself: what a plan by rules can look at before there is a batch."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kpt_lightning.decision import Rejected
from kpt_lightning.validation.workload import named_tensors


def own_inputs(
    model: nn.Module, device: torch.device, context: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], Tensor] | Rejected:
    """A pass on inputs that come with a model, to its loss or to a number made of its outputs.

    That is the outermost module with ``dummy_inputs``, a few tokens (https://huggingface.co/docs/transformers/main_classes/model),
    or else the one with an ``example_input_array`` (https://lightning.ai/docs/pytorch/stable/common/lightning_module.html).

    Args:
        model: That holds it.
        device: Where it is.
        context: Entered around each pass: precision, and what the changes in force put around it.
    """
    for module in model.modules():
        if isinstance(getattr(type(module), "dummy_inputs", None), property) and hasattr(module, "config"):
            return partial(_loss, module, (), _tokens(module, device), context)
    for module in model.modules():
        example: Any = getattr(module, "example_input_array", None)
        if example is not None:
            example = tree_map(lambda value: _moved(value, device), example)
            named = example if isinstance(example, dict) else {}
            placed = () if named else example if isinstance(example, tuple) else (example,)
            return partial(_loss, module, placed, named, context)
    return Rejected(
        "own inputs",
        "no transformers model inside, which would make inputs by itself, and no example_input_array; "
        "a trial has a batch",
    )


def _tokens(module: Any, device: torch.device) -> dict[str, Any]:
    """What a transformers model makes for itself."""
    found = {key: _moved(value, device) for key, value in module.dummy_inputs.items()}
    parameters = inspect.signature(module.forward).parameters
    if getattr(module, "loss_type", None) == "ForCausalLM" and "labels" in parameters and "input_ids" in found:
        found["labels"] = found["input_ids"]
    if "use_cache" in parameters or hasattr(module.config, "use_cache"):
        # A cache is an object that a second run would change.
        found["use_cache"] = False
    return found


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _loss(
    module: nn.Module, placed: tuple[Any, ...], named: dict[str, Any],
    context: Callable[[], AbstractContextManager[Any]],
) -> Tensor:  # fmt: skip
    """The model's own, or one made of all its outputs."""
    with context():
        output = module(*placed, **named)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    outputs = [each for _, each in named_tensors(output) if each.is_floating_point()]
    return torch.stack([each.float().square().mean() for each in outputs]).mean()
