"""Whether a model computes what a reference computes: loss, outputs and gradients, by the one table of gates."""

from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.validation.attempt import Failure, attempt
from kpt_lightning.validation.findings import listed
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.reading import Distance, Reading, distance, judge, read, widest
from kpt_lightning.validation.rounding import rounding_noise
from kpt_lightning.validation.workload import Workload


def compare_with(reference: nn.Module, work: Workload, numerics: Numerics) -> list[Decision]:
    """Run both on one batch with equal seeds, each in the mode that it is in; both are afterwards as before.

    Args:
        reference: Takes the same batch. Gradients are compared by the names of the parameters.
        work: Of the model that is judged.
        numerics: How far the model may be from the reference.
    """
    dtype = max((_compute_dtype(work.model), _compute_dtype(reference)), key=lambda each: torch.finfo(each).eps)
    right = attempt(lambda: _read_shaken(Workload(reference, work.batch, work.loss_fn), dtype))
    if isinstance(right, Failure):
        return [Rejected("parity", f"the reference does not run: {right.text}")]
    mine = attempt(lambda: read(work.model, work.loss_and_outputs))
    if isinstance(mine, Failure):
        return [Rejected("parity", f"the model does not run: {mine.text}")]
    exact, rounding = right.value
    names = _names(exact, mine.value)
    verdict = judge(distance(_shared(exact, mine.value), _shared(mine.value, exact)), gate(numerics, dtype), rounding)
    if not verdict:
        verdict = replace(verdict, reason=verdict.reason + _hint(work.model, reference))
    return [names, replace(verdict, subject="parity")]


def _read_shaken(work: Workload, dtype: torch.dtype) -> tuple[Reading, Distance]:
    """What the reference gives, and how far rounding moves that."""
    exact = read(work.model, work.loss_and_outputs)
    moved = []
    # The gradient of a small parameter may be moved little by chance.
    for seed in range(3):
        with rounding_noise(work.model, dtype, seed=seed):
            moved.append(distance(exact, read(work.model, work.loss_and_outputs)))
    return exact, widest(moved)


def _names(exact: Reading, mine: Reading) -> Decision:
    shared = exact.gradients.keys() & mine.gradients.keys()
    alone = sorted(exact.gradients.keys() ^ mine.gradients.keys())
    if not shared:
        reason = f"no trainable parameter has one name in both, as {listed(alone)}: no gradient can be compared"
        return Rejected("parity of names", reason)
    noted = f"; not compared, for they are trainable in one alone: {listed(alone)}" if alone else ""
    return Accepted("parity of names", f"{len(shared)} gradients are compared{noted}")


def _shared(reading: Reading, other: Reading) -> Reading:
    kept = {name: value for name, value in reading.gradients.items() if name in other.gradients}
    return replace(reading, gradients=kept)


def _hint(model: nn.Module, reference: nn.Module) -> str:
    if model.training != reference.training:
        return "; one is in train mode and the other in eval mode: set both alike"
    dropout = nn.modules.dropout._DropoutNd
    if model.training and any(isinstance(each, dropout) and each.p > 0 for each in model.modules()):
        return "; dropout is on, and two programs may draw other numbers from one seed: compare in eval mode"
    return ""


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """Autocast's where it is on, else that of most weights."""
    kind = next((each.device.type for each in model.parameters()), "cpu")
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    count: Counter[torch.dtype] = Counter()
    for each in model.parameters():
        if each.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            count[each.dtype] += each.numel()
    return max(count, key=lambda dtype: count[dtype], default=torch.float32)
