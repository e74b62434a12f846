"""Linear layers of one input, such as query, key and value, computed in one matrix product.

Measured on one H200 with torch 2.11, forward and backward of half a transformer block, bf16, plain over merged:

=======================================  =====  ========
layers, tokens                           eager  compiled
=======================================  =====  ========
q, k, v of 2048 (8 key heads), 16384     1.02   1.00
q, k, v of 4096 (8 key heads), 8192      1.01   1.00
q, k, v of 2048, 1024                    1.08   1.06
q, k, v of 768, 4096                     1.11   1.03
gate and up, 2048 -> 8192, 16384         0.88   0.97
gate and up, 4096 -> 14336, 8192         0.94   0.98
=======================================  =====  ========

A large product runs as well in parts, and the gradients of the parts have to be laid together in memory. So only
small products of narrow layers are proposed. On a CPU with 2 cores neither gained.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.class_swap import has_hooks, swap_all, swap_back, why_not_swap
from kpt_lightning.candidates.merged_forward import Seat, merged_forward
from kpt_lightning.candidates.replay import forward_pass
from kpt_lightning.candidates.sibling_inputs import siblings_with_one_input
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.validation.attempt import Failure, attempt
from kpt_lightning.validation.calls import ModuleCall
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.parity import compare_modules
from kpt_lightning.validation.state import preserved

_SMALL_FLOPS = 1e10
"""Where the least product of a group takes more, it fills the device by itself (table above)."""

_WIDEST = 3
"""Outputs of a group over its inputs: up to three layers as wide as their input, as q, k and v are."""


class MergedLinear:
    """One product for layers that read one tensor."""

    name = "merged_linear"
    level = Level.CONSERVATIVE
    stage = Stage.MODULES
    turn = 40
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ()
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """All groups that may gain, were seen to read one tensor and are proved to give the same; others by reason."""
        if subject.device.type != "cuda":
            return [
                Rejected(self.name, f"gains nothing on {subject.device.type}: what it saves is launches of kernels")
            ]
        return self.proposals(subject)

    def proposals(self, subject: Subject) -> Sequence[Change | Rejected]:
        """As :meth:`applies`, on any device."""
        run = forward_pass(subject)
        if isinstance(run, Rejected):
            return [Rejected(self.name, run.reason)]
        with preserved(subject.model), subject.forward_context(), torch.enable_grad():
            groups = attempt(lambda: siblings_with_one_input(subject.model, run))
        if isinstance(groups, Failure):
            return [Rejected(self.name, f"the model did not run a second time: {groups.text}")]
        if not groups.value:
            return [Rejected(self.name, "no two linear layers of one module read the same tensor")]
        modules = dict(subject.model.named_modules())
        fitting, reasons = _sorted_out(groups.value, modules, subject)
        rejected = [Rejected(self.name, each) for each in reasons]
        return [_change(fitting, modules), *rejected] if fitting else rejected

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> list[nn.Module]:
        """Give the layers of each group their shared code, in place.

        Raises:
            ConfigError: A name is no plain ``nn.Linear`` of this model.
        """
        modules = dict(subject.model.named_modules())
        seats: dict[str, object] = {}
        for group in setting["groups"]:
            if reason := _why_not(group, modules):
                raise ConfigError("plan.merged_linear", group, reason, "Make a new plan")
            members = [modules[name] for name in group]
            seats |= {name: Seat(members, place) for place, name in enumerate(group)}
        return swap_all(subject.model, merged_forward, seats, "plan.merged_linear")

    def undo(self, subject: Subject, applied: list[nn.Module]) -> None:
        """Restore the classes."""
        swap_back(applied)


CANDIDATE = MergedLinear()


class _Branches(nn.Module):
    """The members of a group as one module."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, input: Tensor) -> list[Tensor]:
        return [member(input) for member in self.members]


def _sorted_out(
    groups: list[list[str]], modules: Mapping[str, nn.Module], subject: Subject
) -> tuple[list[list[str]], list[str]]:
    """Groups that can be merged, and the reasons of the others; each form of group is compared once."""
    fitting: list[list[str]] = []
    reasons: dict[str, str] = {}
    verdicts: dict[Any, str | None] = {}
    for group in groups:
        call = subject.calls.get(group[0])
        if call is None:
            reason: str | None = "no call was recorded, so nothing can be compared"
        else:
            reason = _why_not(group, modules) or _why_no_gain([modules[name] for name in group], call)
        if reason is None and call is not None:
            form = (*(_form(modules[name]) for name in group), repr(call))
            if form not in verdicts:
                verdicts[form] = _unlike([modules[name] for name in group], call)
            reason = verdicts[form]
        if reason is None:
            fitting.append(group)
        else:
            # One line for each reason: a model has many groups alike.
            reasons.setdefault(reason, ", ".join(group))
    return fitting, [f"{names}: {reason}" for reason, names in reasons.items()]


def _why_not(group: Sequence[str], modules: Mapping[str, nn.Module]) -> str | None:
    for name in group:
        if reason := _why_not_one(modules.get(name)):
            return f"{name.rpartition('.')[2]} {reason}"
    layers: list[Any] = [modules[name] for name in group]
    for what, kinds in (
        ("inputs of different sizes", {each.in_features for each in layers}),
        ("weights of different dtypes", {each.weight.dtype for each in layers}),
        ("weights on different devices", {each.weight.device for each in layers}),
        ("biases in some and not in others", {each.bias is None for each in layers}),
    ):
        if len(kinds) > 1:
            return f"they have {what}"
    return None if len(layers) > 1 else "one layer alone is no group"


def _why_no_gain(layers: list[Any], call: ModuleCall) -> str | None:
    width = sum(each.out_features for each in layers) / layers[0].in_features
    if width > _WIDEST:
        return f"their outputs are {width:.1f} times as wide as their input, where merged layers were slower (0.9x)"
    rows = math.prod(call.args[0].shape[:-1])
    least = 2.0 * rows * layers[0].in_features * min(each.out_features for each in layers)
    if least > _SMALL_FLOPS:
        return f"their products are large ({1e-9 * least:.0f} GFLOP), where merging gained nothing (1.0x)"
    return None


def _why_not_one(layer: nn.Module | None) -> str | None:
    if layer is None:
        return "is no module of this model"
    if isinstance(layer, Float8Linear):
        return "runs in FP8, with scales of its own"
    if reason := why_not_swap(layer):
        return f"stays: {reason}"
    if type(layer) is not nn.Linear:
        return f"is a {type(layer).__name__}, not nn.Linear; its own behaviour would be lost"
    if has_hooks(layer):
        return "has hooks, which may change its weight or its output"
    for parameter in (layer.weight, layer.bias):
        if parameter is not None and (type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor):
            return "has a weight that is computed, sharded or quantized"
        if parameter is not None and not parameter.requires_grad:
            return "is frozen: laying its weight together would cost and save no gradient"
    return None


def _unlike(members: list[nn.Module], call: ModuleCall) -> str | None:
    """Why the merged layers do not give what the layers give, or None."""
    merged = _Branches([_shadow(each) for each in members])
    layers: Any = list(merged.members)
    seats = {f"members.{place}": Seat(layers, place) for place in range(len(layers))}
    swap_all(merged, merged_forward, seats, "merged_linear")
    verdict = compare_modules(_Branches(members), merged, call)
    return None if verdict else verdict.reason


def _shadow(layer: nn.Module) -> nn.Module:
    """Another object over the same Parameters."""
    shadow = object.__new__(type(layer))
    vars(shadow).update(vars(layer))
    return shadow


def _form(layer: Any) -> tuple[Any, ...]:
    return layer.in_features, layer.out_features, layer.bias is None, layer.weight.dtype


def _change(groups: list[list[str]], modules: Mapping[str, Any]) -> Change:
    kinds = {", ".join(name.rpartition(".")[2] for name in group): 0 for group in groups}
    for group in groups:
        kinds[", ".join(name.rpartition(".")[2] for name in group)] += 1
    text = "; ".join(f"{count} times {names}" for names, count in kinds.items())
    return Change(candidate=MergedLinear.name, setting={"groups": groups}, reason=f"one product for {text}")
