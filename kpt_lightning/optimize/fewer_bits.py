"""What a change to fewer bits should do to the numbers: noise of the size of those bits in the unchanged model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.optimize.apply import Lookup
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.precision.recipes import E4M3
from kpt_lightning.validation.gates import FP8_SPREADS, Numerics, gate
from kpt_lightning.validation.reading import Expected, Pass, distance, read, widest
from kpt_lightning.validation.rounding import format_noise, rounding_noise

_DRAWS = 3
"""The gradient of a small parameter may be moved little by chance."""


@dataclass(frozen=True, slots=True)
class Bits:
    """The coarsest format of a model, as it is at present.

    Attributes:
        layers: Names of linear layers in FP8; empty where none is.
        forward: Half a unit in the last place of inputs and weights, relative.
        backward: Likewise of output gradients.
    """

    layers: tuple[str, ...]
    forward: float
    backward: float


def bits_of(subject: Subject) -> Bits:
    """FP8 where layers run in it, else bf16: a change that takes bits away takes no more than these unless it shows."""
    found = {name: each for name, each in subject.model.named_modules() if isinstance(each, Float8Linear)}
    if not found:
        half = torch.finfo(torch.bfloat16).eps / 2
        return Bits((), half, half)
    grads = {each.float8.recipe.grad_dtype for each in found.values()}
    return Bits(tuple(found), torch.finfo(E4M3).eps / 2, max(torch.finfo(each).eps for each in grads) / 2)


def expect(model: nn.Module, forward: Pass, bits: Bits) -> Expected | None:
    """What these bits should do to the model; None where there is no room to see it.

    Args:
        model: Unchanged, in the mode in which it is compared.
        forward: Its pass.
        bits: Of the changed model.
    """
    linear = {name: each for name, each in model.named_modules() if type(each) is nn.Linear}
    layers = [each for name, each in linear.items() if not bits.layers or name in bits.layers]
    moved = []
    try:
        with torch.compiler.set_stance("force_eager"):
            exact = read(model, forward)
            for seed in range(_DRAWS):
                with (
                    rounding_noise(model, torch.bfloat16, seed=seed),
                    format_noise(layers, bits.forward, bits.backward, seed=seed),
                ):
                    moved.append(distance(exact, read(model, forward)))
    except torch.OutOfMemoryError:
        return None
    spreads = FP8_SPREADS if bits.layers else gate(Numerics.ROUNDING, torch.bfloat16).spreads
    return Expected(widest(moved), -20 * math.log10(max(bits.forward, bits.backward)), spreads)


def of_fewer_bits(changes: Sequence[Change], lookup: Lookup) -> tuple[list[Change], list[Change]]:
    """Changes of the model's numbers that take bits away, and the others."""
    inside = [change for change in changes if lookup(change.candidate).stage < Stage.OPTIMIZER]
    fewer = [change for change in inside if lookup(change.candidate).numerics is Numerics.PRECISION]
    return fewer, [change for change in inside if change not in fewer]
