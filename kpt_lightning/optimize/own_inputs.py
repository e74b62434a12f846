"""A forward pass on inputs that a model makes itself: what a plan by rules can look at before there is a batch."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kpt_lightning.decision import Rejected
from kpt_lightning.validation.workload import named_tensors


def own_inputs(
    model: nn.Module, device: torch.device, context: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], Tensor] | Rejected:
    """A pass of the outermost module that has ``dummy_inputs``, a few tokens, to its loss or one of its outputs.

    Source: https://huggingface.co/docs/transformers/main_classes/model

    Args:
        model: That holds it.
        device: Where it is.
        context: Entered around each pass: precision, and what the changes in force put around it.
    """
    for module in model.modules():
        if not isinstance(getattr(type(module), "dummy_inputs", None), property) or not hasattr(module, "config"):
            continue
        own: Any = module
        found = {key: _moved(value, device) for key, value in own.dummy_inputs.items()}
        parameters = inspect.signature(module.forward).parameters
        if getattr(module, "loss_type", None) == "ForCausalLM" and "labels" in parameters and "input_ids" in found:
            found["labels"] = found["input_ids"]
        if "use_cache" in parameters or hasattr(module.config, "use_cache"):
            # A cache is an object that a second run would change.
            found["use_cache"] = False
        return partial(_loss, module, found, context)
    return Rejected(
        "own inputs", "no transformers model inside, which would make inputs by itself; a trial has a batch"
    )


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _loss(module: nn.Module, inputs: dict[str, Any], context: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    """The model's own, or one made of all its outputs."""
    with context():
        output = module(**inputs)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    outputs = [each for _, each in named_tensors(output) if each.is_floating_point()]
    return torch.stack([each.float().square().mean() for each in outputs]).mean()
