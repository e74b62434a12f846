"""Weights in bf16, updated with stochastic rounding: no fp32 masters, and no casts of weights under autocast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.memory_shortage import shortage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.candidates.torchao_adam import FULL, Swapped, put_on, take_off, why_not_torchao
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import TORCHAO, OptionalPackage
from kpt_lightning.validation.gates import Numerics

_ROOM = 0.8
"""Share of the free host memory that the copy of the weights may take."""


@dataclass(frozen=True, slots=True)
class _Applied:
    masters: dict[nn.Parameter, Tensor]
    swapped: Swapped


class Bf16Weights:
    """bf16 weights for a model that trains in bf16-mixed, by torchao's stochastic rounding; moments stay fp32.

    The fp32 weights wait on the host. Undo gives back to the bit what was not trained in between, and the trained bf16
    value for the rest. Autocast stays, so that inputs in fp32 are cast as before.
    """

    name = "bf16_weights"
    level = Level.AGGRESSIVE
    stage = Stage.WEIGHTS
    turn = 22
    numerics = Numerics.PRECISION
    features: tuple[str, ...] = ("bf16", "compile")
    packages: tuple[OptionalPackage, ...] = (TORCHAO,)

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change for all fp32 weights; its purpose is memory where memory is short, else speed."""
        if reason := _why_not(subject):
            return [Rejected(self.name, reason)]
        count = sum(each.numel() for each in _weights(subject.model))
        short = shortage(subject)
        reason = f"{count / 1e6:,.1f} million weights and their gradients in half the bytes, fp32 copy on the host"
        return [
            Change(
                candidate=self.name,
                reason=f"{short}; {reason}" if short else reason,
                # Weight and gradient, 2 bytes of 4 each; the gradients may not be there when memory peaks.
                saves_bytes=2 * count if short else None,
            )
        ]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> _Applied:
        """Cast the weights; the Parameter objects stay."""
        if reason := _why_not(subject):
            raise ConfigError("plan.bf16_weights", "on", reason, "Make a new plan")
        assert subject.optimizer is not None
        # Both may fail, and change nothing then.
        masters = {each: each.detach().to("cpu", copy=True) for each in _weights(subject.model)}
        swapped = put_on(subject.optimizer, FULL, stochastic=True)
        for each in masters:
            _set_dtype(each, each.detach().to(torch.bfloat16))
        return _Applied(masters, swapped)

    def undo(self, subject: Subject, applied: _Applied) -> None:
        """fp32 weights and the optimizer before."""
        for each, master in applied.masters.items():
            exact = master.to(each.device)
            _set_dtype(each, torch.where(exact.to(torch.bfloat16) == each.detach(), exact, each.detach().float()))
        take_off(applied.swapped)


CANDIDATE = Bf16Weights()


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.dtype == torch.float32]


def _why_not(subject: Subject) -> str | None:
    if subject.compute_dtype != torch.bfloat16:
        return f"products run in {subject.compute_dtype}; bf16 weights need bf16 autocast first"
    if reason := why_not_torchao(subject):
        return reason
    assert subject.optimizer is not None
    weights = _weights(subject.model)
    if not weights:
        return "no weight is fp32"
    known = {each for group in subject.optimizer.param_groups for each in group["params"]}
    for name, each in subject.model.named_parameters():
        if type(each.data) is not Tensor:
            return f"{name!r} is a {type(each.data).__name__}, a tensor with behaviour of its own"
        if each.requires_grad and each not in known:
            return f"{name!r} is trained by another optimizer, which would round small updates away"
    needed, free = sum(4 * each.numel() for each in weights), psutil.virtual_memory().available
    if needed > _ROOM * free:
        return f"the fp32 copy needs {needed / 1e9:.1f} GB on the host, and {free / 1e9:.1f} GB are free"
    return None


def _set_dtype(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter data of another dtype; a gradient that is there follows."""
    gradient, parameter.grad = parameter.grad, None
    parameter.data = value
    if gradient is not None:
        parameter.grad = gradient.to(value.dtype)
