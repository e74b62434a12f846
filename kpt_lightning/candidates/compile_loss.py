"""Compiling the loss function of a transformers model: its softmax then makes no fp32 copy of the logits."""

from typing import Any

import torch
from torch import nn

from kpt_lightning.decision import Accepted, Decision, Rejected

# transformers keeps a replaced loss function under this name: PreTrainedModel.loss_function.setter.
_SLOT = "_loss_function"


def decide_loss(model: nn.Module) -> Decision:
    """Whether ``model`` holds a transformers model whose loss function can be replaced by its compiled self."""
    found = _owner(model)
    if found is None:
        return Rejected("compile loss", "no module with a transformers loss_function; a loss of your own runs as it is")
    name, owner = found
    if _SLOT in vars(owner):
        return Rejected("compile loss", f"the loss function of {name or type(owner).__name__!r} was replaced already")
    return Accepted("compile loss", f"{owner.loss_type} of {type(owner).__name__}: softmax and loss in one kernel")


def compile_loss(model: nn.Module) -> Any:
    """Compile it.

    Returns:
        The module whose loss function was replaced, for :func:`restore_loss`.
    """
    found = _owner(model)
    assert found is not None, "decide_loss accepted"
    owner: Any = found[1]
    owner.loss_function = torch.compile(owner.loss_function)
    return owner


def restore_loss(owner: nn.Module) -> None:
    """Undo :func:`compile_loss`."""
    vars(owner).pop(_SLOT, None)


def _owner(model: nn.Module) -> tuple[str, Any] | None:
    """The outermost module with a loss function known to transformers."""
    for name, module in model.named_modules():
        slot = getattr(type(module), "loss_function", None)
        if isinstance(slot, property) and slot.fset is not None and getattr(module, "loss_type", None):
            return name, module
    return None
