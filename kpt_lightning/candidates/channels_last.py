"""Convolution weights in channels-last order, in place: nothing is then transposed around a convolution."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.gates import Numerics

Strides = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Applied:
    strides: dict[nn.Parameter, Strides]


class ChannelsLast:
    """``torch.channels_last`` for the weights of 2-D convolutions, with their gradients and optimizer state.

    Activations follow the weights: a convolution gives its output in the order of its weight.
    """

    name = "channels_last"
    level = Level.CONSERVATIVE
    stage = Stage.WEIGHTS
    turn = 25
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ()
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change for all weights that can be laid out anew."""
        named = dict(_convolutions(subject.model))
        if not named:
            return [Rejected(self.name, "no 2-D convolution in the model")]
        reasons = {name: _why_not(weight) for name, weight in named.items()}
        chosen = [name for name, reason in reasons.items() if reason is None]
        if not chosen:
            name, reason = next(iter(reasons.items()))
            return [Rejected(self.name, f"none of {len(named)} convolutions; {name!r}: {reason}")]
        reason = f"{len(chosen)} of {len(named)} convolutions without transposes around them"
        return [Change(candidate=self.name, setting={"modules": chosen}, reason=reason)]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> _Applied:
        """Lay out the weights of a setting; the Parameter objects stay."""
        named, names = dict(_convolutions(subject.model)), setting["modules"]
        for name in names:
            reason = "is no 2-D convolution of this model" if name not in named else _why_not(named[name])
            if reason:
                raise ConfigError("plan.channels_last", name, reason, "Make a new plan")
        weights = dict.fromkeys(named[name] for name in names)
        applied = _Applied({weight: weight.stride() for weight in weights})
        for weight in weights:
            _lay_out(weight, _channels_last(weight), subject.optimizer)
        return applied

    def undo(self, subject: Subject, applied: _Applied) -> None:
        """Lay out the weights as they were."""
        for weight, strides in applied.strides.items():
            _lay_out(weight, strides, subject.optimizer)


CANDIDATE = ChannelsLast()


def _convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in model.named_modules():
        # A weight that is computed (weight_norm or alike) is no Parameter of the module.
        weight = module._parameters.get("weight")
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and weight is not None:
            yield name, weight


def _why_not(weight: nn.Parameter) -> str | None:
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, a tensor with behaviour of its own"
    if weight.is_contiguous(memory_format=torch.channels_last):
        return "its weight is in this order already"
    if not weight.is_contiguous():
        return f"its weight has strides {tuple(weight.stride())} of your own"
    if weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
        return "its weight is a view of a larger buffer"
    return None


def _channels_last(weight: Tensor) -> Strides:
    return torch.empty(weight.shape, device="meta").to(memory_format=torch.channels_last).stride()


def _lay_out(weight: nn.Parameter, strides: Strides, optimizer: torch.optim.Optimizer | None) -> None:
    """Weight, gradient and state get one layout: kernels for many tensors at once fall back where they differ."""
    weight.data = _strided(weight.data, strides)
    if weight.grad is not None and not weight.grad.is_sparse:
        weight.grad.data = _strided(weight.grad.data, strides)
    state = {} if optimizer is None else optimizer.state.get(weight, {})
    for value in state.values():
        if isinstance(value, Tensor) and type(value) is Tensor and value.shape == weight.shape:
            value.data = _strided(value.data, strides)


def _strided(tensor: Tensor, strides: Strides) -> Tensor:
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
