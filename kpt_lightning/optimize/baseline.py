"""The state that others are compared with: what it gives, and how far rounding alone moves that."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from kpt_lightning.candidates.subject import Subject
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.reading import SEED, Distance, Pass, Reading, distance, judge, read
from kpt_lightning.validation.rounding import rounding_noise


@dataclass(frozen=True, slots=True)
class Baseline:
    """A model in one state.

    Attributes:
        reading: What one pass gives.
        rounding: How far rounding, and what is random in spite of equal seeds, move it.
        random: Its numbers depend on the seed, as with dropout, so that they are compared in eval mode.
        note: What a reader must know about the comparison; empty where there is nothing.
    """

    reading: Reading
    rounding: Distance
    random: bool
    note: str = ""


def take_baseline(subject: Subject, forward: Pass) -> Baseline:
    """Run the model as it is now, a few times. Raises whatever the model raises."""
    model = subject.model
    first = read(model, forward)
    random = _differ(first, read(model, forward, seed=SEED + 1)) and not _differ(first, read(model, forward))
    note = ""
    if random:
        with evaluating(model, random):
            try:
                first = read(model, forward)
            except Exception as error:  # noqa: BLE001  a model may refuse eval mode in any way
                random, note = False, f"compared in train mode with equal seeds: in eval mode {error}"
                note = " ".join(note.split())
    with evaluating(model, random):
        if random and _differ(first, read(model, forward, seed=SEED + 1)):
            note = "random in eval mode too: compared with equal seeds"
        moved = [distance(first, read(model, forward))]
        try:
            eager, shaken = _uncompiled(subject, forward)
        except torch.OutOfMemoryError:
            return Baseline(first, _widest(moved), random, note or "no room to measure what rounding moves")
    rounding = _widest([*moved, *(distance(eager, each) for each in shaken)])
    same = judge(distance(eager, first), gate(Numerics.ROUNDING, subject.compute_dtype), rounding)
    if not same:
        reason = f"the model, as you compiled it, differs from itself uncompiled: {same.reason}"
        warnings.warn(f"kpt: {reason}", stacklevel=2)
        note = "; ".join(filter(None, (note, reason)))
    return Baseline(first, rounding, random, note)


def _uncompiled(subject: Subject, forward: Pass) -> tuple[Reading, list[Reading]]:
    """One reading, and two with rounding noise: hooks do not reach into code that the user compiled."""
    with torch.compiler.set_stance("force_eager"):
        eager = read(subject.model, forward)
        with rounding_noise(subject.model, subject.compute_dtype):
            return eager, [read(subject.model, forward) for _ in range(2)]


@contextmanager
def evaluating(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Eval mode for all modules where it is wanted, each put back."""
    before = [(module, module.training) for module in model.modules()]
    if wanted:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _differ(one: Reading, other: Reading) -> bool:
    apart = distance(one, other)
    worst = min(apart.loss, apart.outputs, apart.worst[1])
    # Between two seeds dropout moves numbers by tens of per cent, sums in another order by millionths.
    return not worst >= _SEED_DB


_SEED_DB = 60.0


def _widest(moved: list[Distance]) -> Distance:
    """The largest movement of each figure."""
    names = moved[0].gradients.keys()
    return Distance(
        loss=min(each.loss for each in moved),
        outputs=min(each.outputs for each in moved),
        gradients={name: min(each.gradients.get(name, float("inf")) for each in moved) for name in names},
        missing=(),
    )
