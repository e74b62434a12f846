"""Running a model's forward pass again from its recorded calls, to look at what happens inside."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from kpt_lightning.attention.call import AttentionCall
from kpt_lightning.attention.observe import observe_attention
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.decision import Rejected
from kpt_lightning.validation.attempt import Failure, attempt
from kpt_lightning.validation.calls import ModuleCall, TensorSpec
from kpt_lightning.validation.draw import draw, foreign_argument
from kpt_lightning.validation.state import preserved
from kpt_lightning.validation.workload import feed


def forward_pass(subject: Subject) -> Callable[[], None] | Rejected:
    """A function that runs the forward passes of one step, with gradients on.

    The outermost recorded modules are called: the loss and what a trainer does around the model are left out. A
    floating-point input is the tensor of the batch that looks like it, where one alone does, else random. A model that
    was compiled as a whole may have no recorded call and is fed the batch.

    Returns:
        Rejected where there is neither a recorded call nor a batch, or a call holds an object that it may change.
    """
    outermost = {name: call for name, call in subject.calls.items() if not _inside(name, subject.calls)}
    for name, call in outermost.items():
        if (kind := foreign_argument(call)) is not None:
            return Rejected(
                "forward pass", f"{name or 'the model'} was called with a {kind}, which a second run changes"
            )
    if not outermost and subject.batch is None:
        return Rejected("forward pass", "no batch to run the model on; a plan by trial has one")
    modules = dict(subject.model.named_modules())

    def run() -> None:
        for name, call in outermost.items():
            _call(modules[name], call, subject)
        if not outermost:
            feed(subject.model, subject.batch)

    return run


def observe_model(subject: Subject) -> list[AttentionCall] | Rejected:
    """The attention calls of one forward pass under the changes in force. The model is afterwards as before."""
    run = forward_pass(subject)
    if isinstance(run, Rejected):
        return run

    def observe() -> list[AttentionCall]:
        with preserved(subject.model), subject.forward_context(), torch.enable_grad():
            return observe_attention(run)

    result = attempt(observe)
    if isinstance(result, Failure):
        return Rejected("forward pass", f"the model did not run a second time: {result.text}")
    return result.value


def attention_setting(subject: Subject) -> str | None:
    """``_attn_implementation`` of the first transformers model inside, such as "eager"; None without one."""
    for module in subject.model.modules():
        chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(chosen, str):
            return chosen
    return None


def _inside(name: str, calls: Mapping[str, ModuleCall]) -> bool:
    parts = name.split(".")
    above = [".".join(parts[:count]) for count in range(len(parts))] if name else []
    return any(each in calls for each in above)


def _call(module: torch.nn.Module, call: ModuleCall, subject: Subject) -> None:
    specs, _ = tree_flatten((call.args, call.kwargs))
    values, form = tree_flatten(draw(call, scale=1.0, seed=0))
    real = [each for each in tree_leaves(subject.batch) if isinstance(each, Tensor)]
    args, kwargs = tree_unflatten([_real(*pair, real) for pair in zip(specs, values, strict=True)], form)
    with _autocast(call.autocast, subject.device):
        module(*args, **kwargs)


def _real(spec: Any, value: Any, real: list[Tensor]) -> Any:
    """What a mask holds decides what attention does, so random values would not show it."""
    if not isinstance(spec, TensorSpec):
        return value
    alike = [each for each in real if (each.shape, each.dtype, each.device) == (spec.shape, spec.dtype, spec.device)]
    return alike[0] if len(alike) == 1 else value


def _autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
