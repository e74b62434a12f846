"""Gated MLPs whose activation and product are one kernel, forward and backward, and keep one tensor less."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.class_swap import Forward, swap_all, swap_back, swapped_copy, why_not_swap
from kpt_lightning.candidates.gated_rule import GatedRule, find_gated, plain_twin, projections
from kpt_lightning.candidates.liger import liger_gelu_mul, liger_silu_mul
from kpt_lightning.candidates.likeness import alike
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import LIGER, OptionalPackage
from kpt_lightning.validation.calls import ModuleCall
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.parity import compare_modules

KERNELS = {"silu": liger_silu_mul, "gelu_tanh": liger_gelu_mul}
"""Activation to the kernel that fuses it."""


def gated_forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The forward function of a changed MLP; the name of its one argument is that of the class before."""
    (x,) = (*args, *kwargs.values())
    rule: GatedRule = self.kpt_settings  # type: ignore[assignment]
    gate, up = getattr(self, rule.gate)(x), getattr(self, rule.up)(x)
    out: Tensor = getattr(self, rule.down)(KERNELS[rule.activation](gate, up))
    return out


class FusedMlp:
    """All gated MLPs with an activation that Liger has; their layers are called as they are, FP8 or LoRA too."""

    name = "fused_mlp"
    level = Level.CONSERVATIVE
    stage = Stage.MODULES
    turn = 40
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ()
    # Asked for after the device: on a CPU it would not help to install it.
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change for all that are proved to be gated MLPs; the others are told with the reason."""
        modules = {name: each for name, each in subject.model.named_modules() if projections(each)}
        if not modules:
            return [Rejected(self.name, "no module has three linear layers and no weights of its own")]
        found: list[Change | Rejected] = []
        groups: list[dict[str, Any]] = []
        for names in alike(modules, subject.calls):
            module, call = modules[names[0]], subject.calls.get(names[0])
            title = f"{len(names)} {type(module).__name__} such as {names[0]!r}"
            rule = gated_rule(module, call)
            reason = rule if isinstance(rule, str) else _no_kernel(subject, rule) or why_not_alike(module, rule, call)
            if isinstance(rule, str) or reason:
                found.append(Rejected(self.name, f"{title}: {reason}"))
            else:
                groups.append({"rule": rule.to_dict(), "modules": names})
        count = sum(len(group["modules"]) for group in groups)
        change = Change(candidate=self.name, setting={"groups": groups}, reason=f"{count} gated MLPs by Liger's kernel")
        return [change, *found] if groups else found

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> list[nn.Module]:
        """Give each MLP its new code, in place. Raises ConfigError where a module does not fit."""
        LIGER.require(self.name)
        modules = dict(subject.model.named_modules())
        rules: dict[str, GatedRule] = {}
        for group in setting["groups"]:
            rule = GatedRule(**group["rule"])
            for name in group["modules"]:
                if name in modules and {rule.gate, rule.up, rule.down} != set(projections(modules[name])):
                    raise ConfigError("plan.fused_mlp", name, "has other layers in this model", "Make a new plan")
                rules[name] = rule
        return swap_all(subject.model, gated_forward, rules, "plan.fused_mlp")

    def undo(self, subject: Subject, applied: list[nn.Module]) -> None:
        """Restore the classes."""
        swap_back(applied)


CANDIDATE = FusedMlp()


def gated_rule(module: nn.Module, call: ModuleCall | None) -> GatedRule | str:
    """What a module with three linear layers computes, or why it stays as it is."""
    if call is None:
        return "no call of it was recorded, so nothing can be compared"
    return why_not_swap(module) or _hooked(module) or find_gated(module, call)


def why_not_alike(
    module: nn.Module, rule: GatedRule, call: ModuleCall | None, forward: Forward = gated_forward
) -> str | None:
    """Compare the form that ``forward`` gives it with the module. Returns why they differ, or None."""
    assert call is not None, "a rule is found from a call"
    twin = plain_twin(module)
    fused = swapped_copy(twin, forward, rule)
    # In the other mode too: dropout and alike behave differently there.
    for each in (call, replace(call, training=not call.training)):
        if not (verdict := compare_modules(twin, fused, each)):
            return verdict.reason
    return None


def _no_kernel(subject: Subject, rule: GatedRule) -> str | None:
    if rule.activation not in KERNELS:
        return f"a gated MLP with activation {rule.activation}; Liger has {' and '.join(KERNELS)}"
    if subject.device.type != "cuda":
        return f"a gated MLP; Liger's kernels are Triton's, for CUDA, and this model is on {subject.device}"
    installed = LIGER.available()
    return None if installed else f"a gated MLP; {installed.reason}"


def _hooked(module: nn.Module) -> str | None:
    """Hooks would see what the kernel writes its gradients over, or not be called any more."""
    for name, child in module.named_modules():
        if name and (child._forward_hooks or child._forward_pre_hooks or child._backward_hooks):
            return f"a hook is on its {name!r}"
    return None
