"""Is this model fit to train? Its weights, one pass on a real batch, and its numbers beside those of a reference."""

import math
from typing import Any

from torch import nn

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.validation.attempt import Failure, attempt
from kpt_lightning.validation.findings import Findings, listed
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.reference import compare_with
from kpt_lightning.validation.training_pass import TrainingPass, norm, watch
from kpt_lightning.validation.weights import check_weights, extremes
from kpt_lightning.validation.workload import LossFunction, Workload, named_tensors

GRADIENT_LIMIT = 1000.0
"""Gradient norm over parameter norm: at a rate of 1e-3 one step of SGD would move the parameter by its own size."""


def validate_model(
    model: nn.Module,
    batch: Any = None,
    *,
    loss_fn: LossFunction | None = None,
    reference: nn.Module | None = None,
    numerics: Numerics = Numerics.ROUNDING,
    gradient_limit: float = GRADIENT_LIMIT,
) -> Findings:
    """Check a model; nothing about it is changed, and a bad one raises nothing.

    Weights: hold data, are finite, on one device, of one dtype per module, trainable, shared on purpose. With a batch:
    one forward and backward pass in the mode that the model is in, under the autocast that is on around the call. With
    a reference: outputs and gradients of both, within the limits of ``validation.gates``.

    Args:
        model: On any device.
        batch: One batch on the same device, any pytree, fed as :class:`Workload` says; None checks weights alone.
        loss_fn: See :class:`Workload`.
        reference: A model that is right, for the same batch.
        numerics: How far the model may be from the reference.
        gradient_limit: A gradient is too large where its norm is this many times that of its parameter, or of 1
            where the parameter is smaller.
    """
    found = check_weights(model)
    if batch is None:
        if reference is not None:
            found.append(Rejected("parity", "a reference is compared on a batch, and there is none: pass one"))
        return Findings(tuple(found))
    work = attempt(lambda: Workload(model, batch, loss_fn))
    if isinstance(work, Failure):
        found.append(Rejected("batch", work.text))
        return Findings(tuple(found))
    fits = _batch(model, batch)
    found.append(fits)
    if fits and all(each for each in found if each.subject == "data"):
        passed = _one_pass(work.value, gradient_limit)
        found += passed
        if reference is not None and passed[0]:
            found += compare_with(reference, work.value, numerics)
    return Findings(tuple(found))


def _batch(model: nn.Module, batch: Any) -> Decision:
    tensors = [each for _, each in named_tensors(batch)]
    if tensors and not any(each.numel() for each in tensors):
        return Rejected("batch", "all its tensors are empty: give a batch with samples in it")
    homes = {each.device for each in model.parameters()}
    # Numbers without a dimension are used across devices.
    strangers = {each.device for each in tensors if each.dim() and each.device not in homes}
    if strangers and len(homes) == 1:
        home, where = next(iter(homes)), " and ".join(sorted(map(str, strangers)))
        return Rejected(
            "batch", f"on {where}, and the model on {home}: move it there, such as tensor.to({str(home)!r})"
        )
    return Accepted("batch", f"{len(tensors)} tensors where the model is")


def _one_pass(work: Workload, limit: float) -> list[Decision]:
    seen = TrainingPass()
    ran = attempt(lambda: watch(work, seen))
    if isinstance(ran, Failure):
        where = "after the pass" if seen.stage == "done" else f"in the {seen.stage} pass"
        return [Rejected("forward and backward", f"{where}: {ran.text}")]
    model = work.model
    return [
        Accepted("forward and backward", "both ran"),
        _loss(seen),
        _unused(model, seen),
        _zero(model, seen),
        _finite(seen),
        _size(model, seen, limit),
        _silent(seen),
    ]


def _loss(seen: TrainingPass) -> Decision:
    if math.isfinite(seen.loss):
        return Accepted("loss", f"{seen.loss:.6g}")
    first = seen.first_not_finite
    where = f"the first layer that gave such a value is {first}" if first else "every layer seen gave finite values"
    return Rejected("loss", f"is {seen.loss}: {where}; look there, at the target and at the loss function")


def _unused(model: nn.Module, seen: TrainingPass) -> Decision:
    unused = [name for name, value in seen.norms.items() if value is None]
    if not unused:
        return Accepted("unused parameters", f"each of {len(seen.norms)} trainable parameters got a gradient")
    reason = f"{listed(unused)} got no gradient"
    if idle := sorted({name.rpartition(".")[0] for name in unused} - seen.called - {""}):
        reason += f"; {listed(idle)} was not called"
    step = "use them, or freeze them with requires_grad_(False); DDP would wait for them"
    return Rejected("unused parameters", f"{reason}: {step}")


def _zero(model: nn.Module, seen: TrainingPass) -> Decision:
    dead = [name for name, value in seen.norms.items() if value == 0.0]
    if not dead:
        return Accepted("zero gradients", "none")
    # Behind a weight matrix that is zero, as LoRA begins, gradients are zero for one step.
    zeros = [name for name, each in model.named_parameters() if each.dim() > 1 and extremes(each) == (0.0, 0.0)]
    if zeros:
        reason = (
            f"{listed(dead)}; {listed(zeros)} is zero, as LoRA begins, and hides them for one step: look again then"
        )
        return Accepted("zero gradients", reason)
    step = (
        "a dead activation, a detached branch or a target that does not depend on them; nothing will be learned there"
    )
    return Rejected("zero gradients", f"{listed(dead)} got a gradient of exactly zero: {step}")


def _finite(seen: TrainingPass) -> Decision:
    broken = [name for name, value in seen.norms.items() if value is not None and not math.isfinite(value)]
    if broken:
        step = "torch.autograd.set_detect_anomaly(True) names the operation"
        return Rejected("finite gradients", f"NaN or infinite in {listed(broken)}: {step}")
    return Accepted("finite gradients", "no NaN and no infinity")


def _size(model: nn.Module, seen: TrainingPass, limit: float) -> Decision:
    norms = {name: value for name, value in seen.norms.items() if value is not None and math.isfinite(value)}
    total = math.sqrt(sum(value**2 for value in norms.values()))
    parameters = dict(model.named_parameters())
    large = [
        f"{name} ({value:.3g})"
        for name, value in norms.items()
        if value > limit and value > limit * norm(parameters[name])
    ]
    if large:
        reason = f"{listed(large)}, more than {limit:g} times the norm of the parameter or of 1"
        return Rejected("gradient size", f"{reason}: take the mean in the loss, lower the initial weights, or clip")
    of = "all gradients" if len(norms) == len(seen.norms) else f"the {len(norms)} finite gradients"
    return Accepted("gradient size", f"norm of {of} {total:.4g}")


def _silent(seen: TrainingPass) -> Decision:
    if seen.silent:
        reason = f"{listed(seen.silent)} gave zeros only, for an input that is not zero"
        return Rejected("dead layers", f"{reason}: lower the learning rate, or initialize the weights before it again")
    return Accepted("dead layers", f"none of {len(seen.layers)} layers gave zeros only")
