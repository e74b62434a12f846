"""Norms of any class that compute RMS or layer norm step by step: computed by one kernel."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.class_swap import swap_all, swap_back, swapped_copy, why_not_swap
from kpt_lightning.candidates.likeness import alike
from kpt_lightning.candidates.norm_rule import Backend, NormRule, find_rule, fused_norm, vectors
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import LIGER, TRITON, OptionalPackage
from kpt_lightning.validation.calls import ModuleCall
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.parity import compare_modules


def norm_forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The forward function of a changed norm; the name of its one argument is that of the class before."""
    (x,) = (*args, *kwargs.values())
    rule: NormRule = self.kpt_settings  # type: ignore[assignment]
    bias: Any = None if rule.bias is None else getattr(self, rule.bias)
    return fused_norm(x, getattr(self, rule.weight), bias, rule)


class FusedNorm:
    """All norms that are proved to be one of two formulas, by torch's kernel, one of this package or Liger's."""

    name = "fused_norm"
    level = Level.CONSERVATIVE
    stage = Stage.MODULES
    turn = 40
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ()
    # Each is one of three ways.
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One alternative per backend; the norms that cannot be changed are told with the reason."""
        norms = {name: each for name, each in subject.model.named_modules() if vectors(each)}
        found: list[Change | Rejected] = []
        rules: dict[str, NormRule] = {}
        for names in alike(norms, subject.calls):
            rule = _rule(norms[names[0]], subject.calls.get(names[0]))
            if isinstance(rule, str):
                found.append(Rejected(self.name, f"{_title(names, norms)}: {rule}"))
            else:
                rules |= dict.fromkeys(names, rule)
        changes = [_proved(subject, norms, rules, backend) for backend in _backends(subject)] if rules else []
        if not norms:
            found.append(Rejected(self.name, "no module has one or two vectors of weights and nothing else"))
        return [*(each for group in changes for each in group), *found]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> list[nn.Module]:
        """Give each norm its new code, in place. Raises ConfigError where a module does not fit."""
        if setting["backend"] == "liger":
            LIGER.require("fused_norm by Liger")
        elif setting["backend"] == "kpt" and subject.device.type == "cuda":
            TRITON.require("fused_norm by kernels of this package")
        modules = dict(subject.model.named_modules())
        rules: dict[str, NormRule] = {}
        for group in setting["groups"]:
            rule = NormRule(**group["rule"])
            for name in group["modules"]:
                if name in modules and {rule.weight, rule.bias} - {None} != set(vectors(modules[name])):
                    raise ConfigError("plan.fused_norm", name, "has other parameters in this model", "Make a new plan")
                rules[name] = rule
        return swap_all(subject.model, norm_forward, rules, "plan.fused_norm")

    def undo(self, subject: Subject, applied: list[nn.Module]) -> None:
        """Restore the classes."""
        swap_back(applied)


CANDIDATE = FusedNorm()

_KERNELS: dict[Backend, str] = {
    "torch": "torch's kernel", "kpt": "kernels of this package", "liger": "Liger's Triton kernel",
}  # fmt: skip


def _rule(module: nn.Module, call: ModuleCall | None) -> NormRule | str:
    """What the norm computes, or why it stays as it is."""
    if type(module).__module__.startswith("torch.nn."):
        return "torch's own, one kernel already"
    if reason := why_not_swap(module):
        return reason
    if call is None:
        return "no call of it was recorded, so nothing can be compared"
    return find_rule(module, call)


def _proved(
    subject: Subject, norms: Mapping[str, nn.Module], rules: Mapping[str, NormRule], backend: Backend
) -> list[Change | Rejected]:
    """The change by one backend, of the norms that pass the comparison, and why others do not."""
    found: list[Change | Rejected] = []
    groups: list[dict[str, Any]] = []
    for names in alike({name: norms[name] for name in rules}, subject.calls):
        rule, module = replace(rules[names[0]], backend=backend), norms[names[0]]
        reason = _unfit(rule)
        if reason is None:
            verdict = compare_modules(module, swapped_copy(module, norm_forward, rule), subject.calls[names[0]])
            reason = None if verdict else verdict.reason
        if reason is None:
            groups.append({"rule": rule.to_dict(), "modules": names})
        else:
            found.append(Rejected(FusedNorm.name, f"{_title(names, norms)} by {backend}: {reason}"))
    if not groups:
        return found
    count = sum(len(group["modules"]) for group in groups)
    setting = {"backend": backend, "groups": groups}
    return [Change(candidate=FusedNorm.name, setting=setting, reason=f"{count} norms by {_KERNELS[backend]}"), *found]


def _unfit(rule: NormRule) -> str | None:
    if rule.backend != "torch" and (rule.kind != "rms" or rule.bias is not None):
        return "only RMS norm without bias has such a kernel"
    return None


def _backends(subject: Subject) -> list[Backend]:
    if subject.device.type != "cuda":
        return ["torch"]
    backends: list[Backend] = ["torch"]
    if TRITON.available():
        backends.append("kpt")
    if LIGER.available():
        backends.append("liger")
    return backends


def _title(names: Sequence[str], norms: Mapping[str, nn.Module]) -> str:
    return f"{len(names)} {type(norms[names[0]]).__name__} such as {names[0]!r}"
