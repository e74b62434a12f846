"""Gated MLPs whose three FP8 layers become one: kernels write the FP8 values that the next GEMM reads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.class_swap import swap_all, swap_back
from kpt_lightning.candidates.fused_mlp import gated_rule, why_not_alike
from kpt_lightning.candidates.gated_rule import ACTIVATIONS, GatedRule, projections
from kpt_lightning.candidates.likeness import alike
from kpt_lightning.candidates.own_kernels import why_no_kernels
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Decision, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.precision import float8_gated
from kpt_lightning.precision.float8_linear import ALIGNMENT, Float8Linear
from kpt_lightning.precision.kernel_sizes import LEAST_ELEMENTS, at_every_size, worth_kernels
from kpt_lightning.precision.layer_check import Unit, check_layers
from kpt_lightning.validation.gates import Numerics, gate


def float8_gated_forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The forward function of a changed MLP; the name of its one argument is that of the class before."""
    (x,) = (*args, *kwargs.values())
    rule: GatedRule = self.kpt_settings  # type: ignore[assignment]
    gate, up, down = _layers(self, rule)
    if not worth_kernels(x):
        return _plain_forward(self, x)
    return float8_gated.float8_gated(x, gate.weight, up.weight, down.weight, rule.activation, down.float8)


class Float8Mlp:
    """All gated MLPs whose layers run in tensorwise FP8 by now."""

    name = "float8_mlp"
    level = Level.BALANCED
    stage = Stage.MODULES
    turn = 21
    numerics = Numerics.PRECISION
    features: tuple[str, ...] = ()
    # Asked for after the device: the references run without it.
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change for all that are proved to be gated MLPs in FP8; the others are told with the reason."""
        modules = {name: each for name, each in subject.model.named_modules() if _in_float8(each)}
        if not modules:
            return [Rejected(self.name, "no module has three layers in FP8 and no weights of its own")]
        if reason := why_no_kernels(subject):
            return [Rejected(self.name, reason)]
        found: list[Change | Rejected] = []
        groups: list[dict[str, Any]] = []
        for names in alike(modules, subject.calls):
            module, call = modules[names[0]], subject.calls.get(names[0])
            rule = gated_rule(module, call)
            reason = (
                rule if isinstance(rule, str)
                else _why_not(module, rule) or why_not_alike(module, rule, call, _plain_forward)
            )  # fmt: skip
            if isinstance(rule, str) or reason:
                title = f"{len(names)} {type(module).__name__} such as {names[0]!r}"
                found.append(Rejected(self.name, f"{title}: {reason}"))
            else:
                groups.append({"rule": rule.to_dict(), "modules": names})
        count = sum(len(group["modules"]) for group in groups)
        text = (
            f"{count} gated MLPs, each as one: input quantized once, gate and up merged, their product written in FP8; "
            f"for inputs of {LEAST_ELEMENTS:,} elements and more, and in CUDA graphs"
        )
        change = Change(candidate=self.name, setting={"groups": groups}, reason=text)
        return [change, *found] if groups else found

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> list[nn.Module]:
        """Give each MLP its new code, in place. Raises ConfigError where a module does not fit."""
        modules = dict(subject.model.named_modules())
        rules: dict[str, GatedRule] = {}
        for group in setting["groups"]:
            rule = GatedRule(**group["rule"])
            for name in group["modules"]:
                if name in modules and (reason := _misfit(modules[name], rule)):
                    raise ConfigError("plan.float8_mlp", name, reason, "Make a new plan")
                rules[name] = rule
        return swap_all(subject.model, float8_gated_forward, rules, "plan.float8_mlp")

    def check(self, subject: Subject, run: Callable[[], Tensor]) -> Decision:
        """Each MLP against itself in high precision."""
        least = gate(Numerics.PRECISION, subject.compute_dtype).layer_db
        assert least is not None
        units = {
            name: _unit(module, module.kpt_settings)
            for name, module in subject.model.named_modules()
            if isinstance(getattr(module, "kpt_settings", None), GatedRule) and _in_float8(module)
        }
        with at_every_size():
            return check_layers(subject.model, run, least, units)

    def undo(self, subject: Subject, applied: list[nn.Module]) -> None:
        """Restore the classes."""
        swap_back(applied)


CANDIDATE = Float8Mlp()


def _in_float8(module: nn.Module) -> bool:
    names = projections(module)
    return bool(names) and all(type(module.get_submodule(name)) is Float8Linear for name in names)


def _misfit(module: nn.Module, rule: GatedRule) -> str | None:
    if {rule.gate, rule.up, rule.down} != set(projections(module)):
        return "has other layers in this model"
    if not _in_float8(module):
        return "has layers that are not in FP8"
    return _why_not(module, rule)


def _why_not(module: nn.Module, rule: GatedRule) -> str | None:
    """What the kernels do not do."""
    layers = _layers(module, rule)
    if rule.activation not in float8_gated.ACTIVATIONS:
        return f"activation {rule.activation}; the kernels have {' and '.join(float8_gated.ACTIVATIONS)}"
    if recipes := sorted({layer.float8.recipe.name for layer in layers if layer.float8.recipe.name != "tensorwise"}):
        return f"recipe {recipes[0]}; the kernels have one scale for a tensor"
    if any(layer.bias is not None for layer in layers):
        return "a bias, which the kernels do not add"
    gate, up, _ = layers
    if gate.weight.shape != up.weight.shape or gate.weight.dtype != up.weight.dtype:
        return "gate and up differ in size or dtype"
    if gate.weight.requires_grad != up.weight.requires_grad:
        return "one of gate and up is frozen"
    odd = [size for layer in layers for size in layer.weight.shape if size % ALIGNMENT]
    return f"a size of {odd[0]}, which is no multiple of {ALIGNMENT}" if odd else None


def _plain_forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    (x,) = (*args, *kwargs.values())
    rule: GatedRule = self.kpt_settings  # type: ignore[assignment]
    middle = ACTIVATIONS[rule.activation](getattr(self, rule.gate)(x)) * getattr(self, rule.up)(x)
    out: Tensor = getattr(self, rule.down)(middle)
    return out


def _layers(module: nn.Module, rule: GatedRule) -> tuple[Float8Linear, Float8Linear, Float8Linear]:
    return getattr(module, rule.gate), getattr(module, rule.up), getattr(module, rule.down)


def _unit(module: nn.Module, rule: GatedRule) -> Unit:
    layers = _layers(module, rule)
    settings = layers[2].float8

    def exact(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (ACTIVATIONS[rule.activation](x @ gate.t()) * (x @ up.t())) @ down.t()

    def float8(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return float8_gated.float8_gated(x, gate, up, down, rule.activation, settings)

    names = (rule.gate, rule.up, rule.down)
    weights = {f"{name}.weight": layer.weight for name, layer in zip(names, layers, strict=True)}
    return Unit(module, weights, exact, float8)
