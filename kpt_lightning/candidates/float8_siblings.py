"""FP8 layers by kernels that write both layouts in one pass; layers of one input, such as q, k, v, as one GEMM."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.class_swap import has_hooks, swap_all, swap_back, why_not_swap
from kpt_lightning.candidates.merged_forward import Seat
from kpt_lightning.candidates.own_kernels import why_no_kernels
from kpt_lightning.candidates.replay import forward_pass
from kpt_lightning.candidates.sibling_inputs import siblings_with_one_input
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Decision, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.precision.convert import decide_layers
from kpt_lightning.precision.float8_linear import ALIGNMENT, Float8Linear, Float8Settings, float8_linear
from kpt_lightning.precision.float8_parallel import float8_parallel
from kpt_lightning.precision.kernel_sizes import LEAST_ELEMENTS, at_every_size, worth_kernels
from kpt_lightning.precision.layer_check import Unit, check_layers
from kpt_lightning.validation.attempt import Failure, attempt
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.state import preserved


class Float8Seat(Seat):
    """What one layer of a group holds, and how the group runs."""

    def __init__(self, members: list[nn.Linear], position: int, settings: Float8Settings) -> None:
        """One for each member, all with the same list."""
        super().__init__(members, position)
        self.settings = settings


def float8_seat_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """The forward function of a member; on another input than the first layer's by itself."""
    seat: Float8Seat = self.kpt_settings  # type: ignore[assignment]
    if not worth_kernels(input):
        if isinstance(self, Float8Linear):
            return float8_linear(input, self.weight, self.bias, self.float8)
        return F.linear(input, self.weight, self.bias)
    if seat.position == 0:
        first, *others = _products(seat.members, input, seat.settings)
        for member, part in zip(seat.members[1:], others, strict=True):
            member.kpt_settings.kept = (input, part)  # type: ignore[union-attr]
        return first
    kept, seat.kept = seat.kept, None
    return kept[1] if kept is not None and kept[0] is input else _products([self], input, seat.settings)[0]


class Float8Siblings:
    """All layers in tensorwise FP8, each with those that read the same tensor; small ones beside them too."""

    name = "float8_siblings"
    level = Level.BALANCED
    stage = Stage.MODULES
    # After the MLPs, which come before by their name.
    turn = 21
    numerics = Numerics.PRECISION
    features: tuple[str, ...] = ()
    # Asked for after the device: the references run without it.
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change for all groups that were seen to read one tensor, and layers alone."""
        if reason := why_no_kernels(subject):
            return [Rejected(self.name, reason)]
        run = forward_pass(subject)
        if isinstance(run, Rejected):
            return [Rejected(self.name, run.reason)]
        with preserved(subject.model), subject.forward_context(), torch.enable_grad():
            found = attempt(lambda: siblings_with_one_input(subject.model, run, wrapped=True))
        if isinstance(found, Failure):
            return [Rejected(self.name, f"the model did not run a second time: {found.text}")]
        groups = _groups(subject, found.value)
        if not groups:
            return [Rejected(self.name, "no layer in tensorwise FP8 that the kernels take is called by itself")]
        merged = sum(len(group) > 1 for group in groups)
        layers = sum(map(len, groups))
        text = (
            f"{layers} layers by kernels that quantize an input once, {merged} groups of them merged; for inputs of "
            f"{LEAST_ELEMENTS:,} elements and more, and in CUDA graphs"
        )
        return [Change(candidate=self.name, setting={"groups": groups}, reason=text)]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> list[nn.Module]:
        """Give the layers their shared code, in place. Raises ConfigError where a layer does not fit."""
        modules = dict(subject.model.named_modules())
        seats: dict[str, object] = {}
        for group in setting["groups"]:
            if reason := _why_not(group, modules):
                raise ConfigError("plan.float8_siblings", group, reason, "Make a new plan")
            members: list[Any] = [modules[name] for name in group]
            settings = next(each.float8 for each in members if isinstance(each, Float8Linear))
            seats |= {name: Float8Seat(members, place, settings) for place, name in enumerate(group)}
        return swap_all(subject.model, float8_seat_forward, seats, "plan.float8_siblings")

    def check(self, subject: Subject, run: Callable[[], Tensor]) -> Decision:
        """Each layer against itself in high precision."""
        least = gate(Numerics.PRECISION, subject.compute_dtype).layer_db
        assert least is not None
        seated = {name: each for name, each in subject.model.named_modules() if _seat(each) is not None}
        with at_every_size():
            return check_layers(subject.model, run, least, {name: _unit(each) for name, each in seated.items()})

    def undo(self, subject: Subject, applied: list[nn.Module]) -> None:
        """Restore the classes."""
        swap_back(applied)


CANDIDATE = Float8Siblings()


def _products(members: Sequence[nn.Linear], x: Tensor, settings: Float8Settings) -> list[Tensor]:
    return float8_parallel(x, [each.weight for each in members], [each.bias for each in members], settings)


def _groups(subject: Subject, siblings: list[list[str]]) -> list[list[str]]:
    """Groups with a layer in FP8 and others that may be, then the layers that stay alone."""
    modules = dict(subject.model.named_modules())
    # What is too small for FP8 by itself costs nothing beside another.
    section = subject.config.float8.model_copy(update={"only_where_it_pays": False})
    small = {each.subject for each in decide_layers(subject.model, section) if each}
    groups: list[list[str]] = []
    taken: set[str] = set()
    for names in siblings:
        fit = [name for name in names if name in small or isinstance(modules[name], Float8Linear)]
        for group in _alike(fit, modules):
            if len(group) > 1 and not taken & set(group) and _why_not(group, modules) is None:
                groups.append(group)
                taken |= set(group)
    alone = [name for name in modules if name not in taken and name in subject.calls]
    return groups + [[name] for name in alone if _why_not([name], modules) is None]


def _alike(names: Sequence[str], modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """Apart by dtype and by whether they are trained: of a LoRA the base is frozen, and its adapters read the same."""
    kinds: dict[tuple[torch.dtype, bool], list[str]] = {}
    for name in names:
        weight: Any = modules[name].weight
        kinds.setdefault((weight.dtype, weight.requires_grad), []).append(name)
    return list(kinds.values())


def _why_not(group: Sequence[str], modules: Mapping[str, nn.Module]) -> str | None:
    layers: list[Any] = [modules.get(name) for name in group]
    for name, layer in zip(group, layers, strict=True):
        if type(layer) not in (Float8Linear, nn.Linear):
            return f"{name} is no linear layer of torch, plain or in FP8"
        if reason := why_not_swap(layer):
            return f"{name} stays: {reason}"
        if has_hooks(layer):
            return f"{name} has hooks"
        if odd := [size for size in layer.weight.shape if size % ALIGNMENT]:
            return f"{name} has a size of {odd[0]}, which is no multiple of {ALIGNMENT}"
    in_float8 = [layer for layer in layers if isinstance(layer, Float8Linear)]
    if not in_float8:
        return "no layer of it is in FP8"
    if any(layer.float8.recipe.name != "tensorwise" for layer in in_float8):
        return "the kernels have one scale for a tensor"
    first = layers[0].weight
    if any(each.weight.dtype != first.dtype or each.weight.requires_grad != first.requires_grad for each in layers):
        return "its weights differ in dtype, or some are frozen"
    return None if all(each.in_features == layers[0].in_features for each in layers) else "inputs of different sizes"


def _seat(module: nn.Module) -> Float8Seat | None:
    found = vars(module).get("kpt_settings")
    return found if isinstance(found, Float8Seat) else None


def _unit(layer: Any) -> Unit:
    seat = _seat(layer)
    assert seat is not None

    def bias_in(dtype: torch.dtype) -> Tensor | None:
        return None if layer.bias is None else layer.bias.detach().to(dtype)

    return Unit(
        layer,
        {"": layer.weight},
        lambda x, weight: F.linear(x, weight, bias_in(weight.dtype)),
        lambda x, weight: float8_parallel(x, [weight], [layer.bias], seat.settings)[0],
        shared=len(seat.members) > 1,
    )
