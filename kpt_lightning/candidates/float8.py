"""FP8 matrix products in linear layers, per recipe and per group of layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import FP8_PRECISIONS, Float8Config, KptConfig, Level
from kpt_lightning.decision import Decision, Rejected
from kpt_lightning.optional import TORCHAO, OptionalPackage
from kpt_lightning.precision.convert import convert_to_float8, decide_layers, float8_available, restore_linear
from kpt_lightning.precision.layer_check import check_layers
from kpt_lightning.validation.calls import TensorSpec
from kpt_lightning.validation.gates import Numerics, gate

# The fastest, and the most accurate of those that need no more memory; a recipe that the user names is the only one.
_RECIPES = ("tensorwise", "rowwise_with_gw_hp")

# Measured on one H200 at 2048 x 8192: FP8 GEMMs run 1.85 times as fast as bf16 ones, these at about 70 % of peak.
_GEMM_RATIO, _BF16_OF_PEAK = 1.85, 0.7


# Candidates of which one must be in force, for casts to be fused.
_COMPILING = frozenset({"causal_attention", "compile_blocks", "compile_model"})


def with_head(config: KptConfig) -> Float8Config:
    """The float8 section; at the aggressive level the head may run in FP8 too, unless the user excluded it by name."""
    if config.level is not Level.AGGRESSIVE or "exclude" in config.float8.model_fields_set:
        return config.float8
    return config.float8.model_copy(update={"exclude": ()})


class Float8:
    """Linear layers in FP8, master weights as they are."""

    name = "float8"
    level = Level.BALANCED
    stage = Stage.WEIGHTS
    turn = 20
    numerics = Numerics.PRECISION
    # Depends on the recipe, and emulation needs none.
    features: tuple[str, ...] = ()
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """All layers that may, by recipe; then the large ones alone; and all of them by another library."""
        if reason := _why_not(subject):
            return [Rejected(self.name, reason)]
        config = with_head(subject.config)
        recipes = (config.recipe,) if "recipe" in config.model_fields_set else _RECIPES
        backends = _backends(config)
        found: list[Change | Rejected] = []
        for recipe in recipes:
            section = config.model_copy(update={"recipe": recipe})
            verdict = float8_available(section, subject.profile)
            if not verdict:
                found.append(Rejected(self.name, verdict.reason))
                continue
            decisions = decide_layers(subject.model, section)
            names = [each.subject for each in decisions if each]
            if not names:
                found.append(Rejected(self.name, _why_none(decisions)))
                continue
            # A more exact recipe does more work: it is of use only where the first does not pass.
            behind = recipe != recipes[0]
            ours, *others = backends
            groups = _groups(subject.model, names)
            found += [_change(subject, recipe, group, text, behind, ours) for group, text in groups]
            if not behind:
                found += [_change(subject, recipe, *groups[0], False, other) for other in others]
        return found

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> list[nn.Linear]:
        """Convert in place. Raises ConfigError where a name is no nn.Linear of this model."""
        backend = setting.get("backend", "native")
        config = subject.config.float8.model_copy(update={"recipe": setting["recipe"], "backend": backend})
        return convert_to_float8(subject.model, setting["layers"], config)

    def check(self, subject: Subject, run: Callable[[], Tensor]) -> Decision:
        """Each layer against itself in high precision."""
        least = gate(Numerics.PRECISION, subject.compute_dtype).layer_db
        assert least is not None
        return check_layers(subject.model, run, least)

    def undo(self, subject: Subject, applied: list[nn.Linear]) -> None:
        """Restore the classes."""
        restore_linear(applied)


CANDIDATE = Float8()


def why_no_float8(subject: Subject) -> str | None:
    """Why nothing of the model may run in FP8, by what was asked for and by its dtype; None where it may."""
    if subject.config.precision not in ("auto", *FP8_PRECISIONS):
        return f"precision={subject.config.precision!r} was asked for"
    if subject.compute_dtype is not torch.bfloat16 and not subject.config.float8.emulate:
        return f"the model runs in {subject.compute_dtype}; FP8 goes with bf16: use precision='bf16-mixed'"
    return None


def _why_not(subject: Subject) -> str | None:
    if reason := why_no_float8(subject):
        return reason
    if subject.config.precision == "auto" and not _COMPILING & set(subject.applied):
        return "without compiled blocks the casts cost more than FP8 wins; precision='fp8' insists"
    return None


def _why_none(decisions: Sequence[Decision]) -> str:
    reasons = sorted({each.reason.partition(": ")[2] or each.reason for each in decisions})
    return f"none of {len(decisions)} linear layers can or should: {'; '.join(reasons[:2]) or 'there is none'}"


def _groups(model: nn.Module, names: list[str]) -> list[tuple[list[str], str]]:
    """All layers, and the largest ones alone where they are most of the work."""
    modules = dict(model.named_modules())
    sizes = {name: _elements(modules[name]) for name in names}
    largest = [name for name in names if 2 * sizes[name] > max(sizes.values())]
    groups = [(names, f"{len(names)} linear layers")]
    if 0 < len(largest) < len(names):
        groups.append((largest, f"the {len(largest)} largest linear layers"))
    return groups


def _backends(config: Float8Config) -> tuple[str, ...]:
    """The one that was asked for; else ours, and torchao's where it is installed and has the same layers."""
    if "backend" in config.model_fields_set or config.emulate or config.odd_dims == "pad" or not TORCHAO.available():
        return (config.backend,)
    return ("native", "torchao")


def _change(subject: Subject, recipe: str, names: list[str], text: str, fallback: bool, backend: str) -> Change:
    other = {} if backend == "native" else {"backend": backend}
    return Change(
        candidate="float8",
        setting={"recipe": recipe, "layers": names, **other},
        reason=f"{text}, recipe {recipe}" + (f", by {backend}" if other else ""),
        predicted=_predicted(subject, names),
        fallback=fallback,
    )


def _predicted(subject: Subject, names: list[str]) -> float | None:
    """Amdahl over the products of these layers alone; what quantization costs is left out, so it is an upper bound."""
    peak = subject.profile.peak_flops("bfloat16")
    if peak is None or not subject.step_seconds or subject.device.type != "cuda":
        return None
    modules = dict(subject.model.named_modules())
    flops = sum(6.0 * _rows(subject, name) * _elements(modules[name]) for name in names)
    saved = flops / (peak.flops * _BF16_OF_PEAK) * (1 - 1 / _GEMM_RATIO)
    return float(subject.step_seconds) / max(subject.step_seconds - saved, 1e-9)


def _elements(layer: nn.Module) -> int:
    weight = layer.weight
    return weight.numel() if isinstance(weight, torch.Tensor) else 0


def _rows(subject: Subject, name: str) -> int:
    call = subject.calls.get(name)
    first = call.args[0] if call is not None and call.args else None
    if not isinstance(first, TensorSpec):
        return 0
    rows = call.count if call is not None else 1
    for size in first.shape[:-1]:
        rows *= size
    return rows
