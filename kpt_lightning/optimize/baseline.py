"""The state that others are compared with: what it gives, and how far rounding alone moves that."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from kpt_lightning.candidates.subject import Subject
from kpt_lightning.errors import KptError
from kpt_lightning.validation.attempt import one_line
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.reading import SEED, Distance, Pass, Reading, distance, judge, read, widest
from kpt_lightning.validation.rounding import rounding_noise


@dataclass(frozen=True, slots=True)
class Baseline:
    """A model in one state.

    Attributes:
        reading: What one pass gives.
        rounding: How far rounding, and what is random in spite of equal seeds, move it.
        random: Its numbers depend on the seed, as with dropout, so that they are compared in eval mode.
        unsteady: Why no change of its numbers can be judged: they differ between runs with equal seeds. Empty where
            they do not.
        note: What a reader must know about the comparison; empty where there is nothing.
    """

    reading: Reading
    rounding: Distance
    random: bool
    unsteady: str = ""
    note: str = ""

    def why_not(self, numerics: Numerics) -> str:
        """Why a change of this kind cannot be judged; empty where it can."""
        return "" if numerics is Numerics.SAME else self.unsteady


def take_baseline(subject: Subject, forward: Pass) -> Baseline:
    """Run the model as it is now, a few times. Raises whatever the model raises.

    Raises:
        KptError: The loss or a gradient is not finite.
    """
    model = subject.model
    first = _finite(read(model, forward))
    random = _differ(first, read(model, forward, seed=SEED + 1)) and not _differ(first, read(model, forward))
    note = ""
    if random:
        with evaluating(model, random):
            try:
                first = read(model, forward)
            except Exception as error:  # noqa: BLE001  a model may refuse eval mode in any way
                random, note = False, one_line(f"compared in train mode with equal seeds: in eval mode {error}")
    with evaluating(model, random):
        if random and _differ(first, read(model, forward, seed=SEED + 1)):
            note = "random in eval mode too: compared with equal seeds"
        moved = distance(_finite(first), read(model, forward))
        unsteady = _unsteady(moved, gate(Numerics.ROUNDING, subject.compute_dtype).output_db - _ORDER_DB)
        if unsteady:
            warnings.warn(f"kpt: {unsteady}", stacklevel=2)
            # What noise does cannot be told from what chance does.
            moved = widest([moved, *(distance(first, read(model, forward)) for _ in range(3))])
            return Baseline(first, moved, random, unsteady, note)
        try:
            eager, shaken = _uncompiled(subject, forward)
        except torch.OutOfMemoryError:
            note = note or "no room to measure what rounding moves"
            return Baseline(first, moved, random, note=note)
    rounding = widest([moved, *(distance(eager, each) for each in shaken)])
    same = judge(distance(eager, first), gate(Numerics.ROUNDING, subject.compute_dtype), rounding)
    if not same:
        reason = f"the model, as you compiled it, differs from itself uncompiled: {same.reason}"
        warnings.warn(f"kpt: {reason}", stacklevel=2)
        note = "; ".join(filter(None, (note, reason)))
    return Baseline(first, rounding, random, note=note)


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
    worst = min(apart.loss, apart.worst_output[1], apart.worst[1])
    # Between two seeds dropout moves numbers by tens of per cent, sums in another order by millionths.
    return not worst >= _SEED_DB


_SEED_DB = 60.0

_ORDER_DB = 20.0
"""Atomic additions of CUDA come in another order each time: in a deep model ten times what one chain of sums moves."""


def _unsteady(moved: Distance, least: float) -> str:
    """Of gradients the median: one that is nothing but rounding differs each time."""
    figures = {
        "the loss": moved.loss,
        **{f"output {place}": value for place, value in moved.outputs.items()},
        "the median gradient": moved.median_gradient,
        **{name: float("nan") for name in moved.missing},
    }
    found = [(name, value) for name, value in figures.items() if not value >= least]
    if not found:
        return ""
    name, value = found[0]
    return (
        f"the model gives other numbers in each run with equal seeds ({name} agrees to {value:.1f} dB, and {least:.0f} "
        "are needed), so that no change of its numbers can be judged. Let its random numbers come from generators of "
        "torch, NumPy or random, which are seeded here, or give a batch and a mode in which it is deterministic"
    )


def _finite(reading: Reading) -> Reading:
    """Raise KptError where the model gives no numbers."""
    if not math.isfinite(reading.loss):
        raise KptError(
            f"the loss of the unchanged model is {reading.loss}, so nothing can be compared with it. Make one forward "
            "and backward pass give a finite loss first"
        )
    for name, each in reading.gradients.items():
        if each is not None and not bool(torch.isfinite(each).all()):
            raise KptError(
                f"the gradient of {name!r} holds NaN or infinity in the unchanged model, so nothing can be compared "
                "with it. Make one forward and backward pass give finite gradients first"
            )
    return reading
