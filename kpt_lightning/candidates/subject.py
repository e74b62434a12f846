"""What an optimization is applied to: a model with what surrounds it in training."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from kpt_lightning.config import KptConfig
from kpt_lightning.hardware import HardwareProfile
from kpt_lightning.validation.calls import ModuleCall


@dataclass(slots=True, kw_only=True)
class Subject:
    """One model on one device, and all that a candidate may look at.

    Attributes:
        model: Changed in place.
        profile: Of the devices that this run uses.
        config: The user's settings.
        device: Where the model runs.
        compute_dtype: In which its matrix products run: autocast's, else that of the weights.
        owns_precision: Autocast may be changed: no trainer is in charge of it.
        goal: What is wanted; memory proposes what costs speed.
        own_loss: The model itself gives the loss: no loss function and no ``training_step`` of the user's does.
        batch: One real batch on the device, any pytree; None where a plan is replayed or made by rules.
        loader: The training data loader, None where it is not known.
        optimizer: The one optimizer, None where it is not known.
        step_seconds: Time of one forward and backward pass of the unchanged model; None where it was not measured.
        calls: Module name to one recorded call of it, from one forward pass on ``batch``; empty without a batch.
        contexts: Entered around every forward pass by whoever drives the model; candidates append and remove theirs.
        applied: Names of the candidates that are in force now, in order of application.
        key: Differs between sets of changes: compiled code made under one set is never used under another.
    """

    model: nn.Module
    profile: HardwareProfile
    config: KptConfig
    device: torch.device
    compute_dtype: torch.dtype = torch.float32
    owns_precision: bool = False
    goal: Literal["speed", "memory"] = "speed"
    own_loss: bool = True
    batch: Any = None
    loader: Iterable[Any] | None = None
    optimizer: torch.optim.Optimizer | None = None
    step_seconds: float | None = None
    calls: Mapping[str, ModuleCall] = field(default_factory=dict)
    contexts: list[Callable[[], AbstractContextManager[Any]]] = field(default_factory=list)
    applied: list[str] = field(default_factory=list)
    key: str = ""

    def forward_context(self) -> AbstractContextManager[Any]:
        """All contexts of the changes in force, entered."""
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            # Those before one that cannot be entered are left.
            return stack.pop_all()
