"""What a plan by rules adds once the model is on its device: changes that prove themselves on its own inputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Candidate, Change, SelfChecking, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.optimize.apply import applied
from kpt_lightning.optimize.guarded import check_device, told
from kpt_lightning.optimize.own_inputs import own_inputs
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.put_back import UnrestoredError, put_back
from kpt_lightning.validation.calls import record_calls
from kpt_lightning.validation.state import preserved

PROVED = ("float8_cross_entropy", "float8_mlp", "float8_siblings")
"""In the order in which they are asked. Faster in a step of 16384 tokens, 2048 wide, on an H200
(benchmarks/results/candidate_stack_nvidia-h200_2026-11-23.md); what is smaller they leave alone, the head aside."""

_HEAD = "float8_cross_entropy"


def extended(plan: Plan, subject: Subject, run: Callable[[], Tensor] | None = None) -> Plan:
    """The plan with those of :data:`PROVED` that hold on this model; the model is afterwards as before.

    Each is asked on top of those before, without compilation, and compares what it replaced with high precision. Its
    answer is a choice of the plan, whatever it is.

    Args:
        plan: By rules, with layers in FP8.
        subject: Its model, on its device.
        run: Its forward pass on a real batch, to the loss; without it the model's own inputs are used.

    Raises:
        UnrestoredError: The model could not be put back.
    """
    looked = run or own_inputs(subject.model, subject.device, lambda: _context(subject, plan.precision))
    if isinstance(looked, Rejected):
        return replace(plan, choices=[*plan.choices, Rejected("float8 kernels", looked.reason)])
    changes, choices = list(plan.changes), list(plan.choices)
    for name in PROVED:
        # The head as it is: a layer in FP8 by itself cannot join.
        kept = [] if name == _HEAD else changes
        change = _proved(subject, kept, registry.candidate(name), looked)
        choices.append(Accepted(name, change.reason) if isinstance(change, Change) else change)
        if isinstance(change, Change):
            if name == _HEAD:
                changes = _without_head(changes, change.setting["head"])
                choices = [_joined(choice) for choice in choices]
            changes.append(change)
    extended = replace(plan, changes=changes, choices=choices)
    extended.layers = [_beside(layer, extended) for layer in plan.layers]
    return extended


def _beside(layer: Decision, plan: Plan) -> Decision:
    """What was too small by itself and runs beside another, or as part of another."""
    if layer or layer.subject not in plan.float8_layers:
        return layer
    return Accepted(layer.subject, f"{layer.reason}; but it costs nothing beside the layers that read the same tensor")


def _without_head(changes: Sequence[Change], head: str) -> list[Change]:
    """Without what the joined head and loss take the place of."""
    found = [change for change in changes if change.candidate != "compile_loss"]
    for number, change in enumerate(found):
        if change.candidate == "float8":
            layers = [name for name in change.setting["layers"] if name != head]
            found[number] = replace(change, setting={**change.setting, "layers": layers})
    return [change for change in found if change.candidate != "float8" or change.setting["layers"]]


def _joined(choice: Decision) -> Decision:
    if choice and choice.subject == "compile loss":
        return Rejected(choice.subject, "head and loss run as one in FP8")
    return choice


def _proved(
    subject: Subject, kept: Sequence[Change], candidate: Candidate, run: Callable[[], Tensor]
) -> Change | Rejected:
    """The first change that a candidate proposes, where it holds."""
    verdict: Decision = registry.admitted(candidate, subject.config.level.and_below, subject.profile.supports)
    if isinstance(verdict, Rejected):
        return verdict
    eager = [change for change in kept if registry.candidate(change.candidate).stage is not Stage.COMPILE]
    try:
        with put_back(subject):
            return _asked(subject, eager, candidate, run)
    except UnrestoredError:
        raise
    except Exception as error:  # noqa: BLE001  a candidate may fail in any way, and the plan goes on without it
        check_device(subject.device)
        return Rejected(candidate.name, f"failed to look: {told(error)}")


def _asked(
    subject: Subject, kept: Sequence[Change], candidate: Candidate, run: Callable[[], Tensor]
) -> Change | Rejected:
    with applied(subject, kept), preserved(subject.model):
        subject.calls = record_calls(subject.model, run)
        offered = candidate.applies(subject)
    change = next((each for each in offered if isinstance(each, Change) and not each.fallback), None)
    if change is None:
        return Rejected(candidate.name, "; ".join(dict.fromkeys(each.reason for each in offered)))
    if not isinstance(candidate, SelfChecking):
        return change
    with applied(subject, [*kept, change]), preserved(subject.model):
        checked = candidate.check(subject, run)
    if not checked:
        return Rejected(candidate.name, checked.reason)
    return replace(change, reason=f"{change.reason}; {checked.reason}")


@contextmanager
def _context(subject: Subject, precision: str) -> Iterator[None]:
    kind, dtype = subject.device.type, subject.compute_dtype
    with torch.autocast(kind, dtype, enabled=precision == "fp8"), subject.forward_context(), torch.enable_grad():
        yield
