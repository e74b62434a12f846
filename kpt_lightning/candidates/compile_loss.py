"""Compiling the loss function of a transformers model: its softmax then makes no fp32 copy of the logits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.inductor import Inductor
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.gates import Numerics

# transformers keeps a replaced loss function under this name: PreTrainedModel.loss_function.setter.
LOSS_SLOT = "_loss_function"


def decide_loss(model: nn.Module) -> Decision:
    """Whether ``model`` holds a transformers model whose loss function can be replaced by its compiled self."""
    found = _owner(model)
    if found is None:
        return Rejected("compile loss", "no module with a transformers loss_function; a loss of your own runs as it is")
    name, owner = found
    if LOSS_SLOT in vars(owner):
        return Rejected("compile loss", f"the loss function of {name or type(owner).__name__!r} was replaced already")
    return Accepted("compile loss", f"{owner.loss_type} of {type(owner).__name__}: softmax and loss in one kernel")


def compile_loss(model: nn.Module, key: str = "") -> Any:
    """Compile it; ``key`` as in ``candidates.inductor``.

    Returns:
        The module whose loss function was replaced, for :func:`restore_loss`.
    """
    found = _owner(model)
    assert found is not None, "decide_loss accepted"
    owner: Any = found[1]
    owner.loss_function = torch.compile(owner.loss_function, backend=Inductor(key))
    return owner


def restore_loss(owner: nn.Module) -> None:
    """Undo :func:`compile_loss`."""
    vars(owner).pop(LOSS_SLOT, None)


class CompileLoss:
    """The loss function of a transformers model, compiled."""

    name = "compile_loss"
    level = Level.CONSERVATIVE
    stage = Stage.COMPILE
    turn = 11
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ("compile",)
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """Where there is one that nobody replaced."""
        if subject.config.compile.loss is False:
            return [Rejected(self.name, "switched off by compile.loss=False")]
        verdict = decide_loss(subject.model)
        if not verdict:
            return [Rejected(self.name, verdict.reason)]
        return [Change(candidate=self.name, reason=verdict.reason)]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> nn.Module:
        """As :func:`compile_loss`.

        Raises:
            ConfigError: The model has no such loss function.
        """
        verdict = decide_loss(subject.model)
        if not verdict:
            raise ConfigError("plan.compile_loss", True, verdict.reason, "Make a new plan")
        owner: nn.Module = compile_loss(subject.model, subject.key)
        return owner

    def undo(self, subject: Subject, applied: nn.Module) -> None:
        """As :func:`restore_loss`."""
        restore_loss(applied)


CANDIDATE = CompileLoss()


def _owner(model: nn.Module) -> tuple[str, Any] | None:
    """The outermost module with a loss function known to transformers."""
    for name, module in model.named_modules():
        slot = getattr(type(module), "loss_function", None)
        if isinstance(slot, property) and slot.fset is not None and getattr(module, "loss_type", None):
            return name, module
    return None
