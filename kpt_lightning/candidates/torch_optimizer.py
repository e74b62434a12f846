"""Which optimizers are torch's own and untouched, so that another kernel may take their step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from kpt_lightning.candidates.subject import Subject

# Beside the step count; all of it has the shape and dtype of the parameter.
STATE: dict[type[Optimizer], frozenset[str]] = {
    Adam: frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    AdamW: frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    SGD: frozenset({"momentum_buffer"}),
    Adagrad: frozenset({"sum"}),
}
"""Classes whose step is known here, each with the state that it keeps for a parameter."""


def why_not(subject: Subject, *, kernels: bool = True) -> str | None:
    """The reason to leave the optimizer alone, or None.

    Args:
        subject: With the optimizer.
        kernels: Other kernels are what is wanted, so that ``fused`` and ``foreach`` of the user's are not overruled.
    """
    optimizer = subject.optimizer
    if optimizer is None:
        return "the optimizer is not known; pass it as optimizer="
    if type(optimizer) not in STATE:
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        return f"{kind} is none of {', '.join(known.__name__ for known in STATE)} of torch itself"
    if subject.compute_dtype == torch.float16:
        # torch/amp/grad_scaler.py: the optimizer then unscales inside its step, and Lightning refuses to clip.
        return "a gradient scaler (float16) unscales inside such kernels, and clipping before them then fails"
    for group in optimizer.param_groups:
        if reason := _why_not_group(group, kernels):
            return reason
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return _why_not_parameters(parameters) or _why_not_sparse(subject.model, parameters) or _why_not_state(optimizer)


def _why_not_group(group: Mapping[str, Any], kernels: bool) -> str | None:
    for name in ("fused", "foreach") if kernels else ():
        if group.get(name) is not None:
            return f"{name}={group[name]} was set by you"
    if group.get("differentiable"):
        return "differentiable=True, which only torch's slower kernels support"
    if group.get("capturable"):
        return "capturable=True: its step is made for a CUDA graph of your own"
    if any(isinstance(value, Tensor) for value in group.get("betas", ())):
        return "its betas are tensors, which is left to torch's other kernels"
    return None


def _why_not_parameters(parameters: Sequence[Tensor]) -> str | None:
    if not parameters:
        return "it has no parameters"
    devices = sorted({str(each.device) for each in parameters})
    if len(devices) > 1:
        return f"its parameters lie on {', '.join(devices)}, and not on one device"
    for each in parameters:
        if not each.is_floating_point():
            return f"a parameter is {each.dtype}; not a floating-point type"
        if (kind := type(each.data)) not in (Tensor, DTensor):
            return f"a parameter is a {kind.__name__}, a tensor with behaviour of its own"
    return None


def _why_not_sparse(model: nn.Module, parameters: Sequence[Tensor]) -> str | None:
    for name, module in model.named_modules():
        if getattr(module, "sparse", None) is True:
            return f"{name!r} gives sparse gradients, which only torch's slower kernels support"
    if any(each.grad is not None and each.grad.is_sparse for each in parameters):
        return "a gradient is sparse, which only torch's slower kernels support"
    return None


def _why_not_state(optimizer: Optimizer) -> str | None:
    known = STATE[type(optimizer)]
    for each, state in optimizer.state.items():
        for name, value in state.items():
            if name == "step":
                fits = isinstance(value, Tensor)
            elif name not in known:
                return f"its state holds {name!r}, which torch's {type(optimizer).__name__} does not have"
            else:
                same = value is None or (value.shape, value.dtype) == (each.shape, each.dtype)
                fits = same and (value is None or value.device == each.device)
            if not fits:
                return f"its state {name!r} differs from its parameter in shape, dtype or device"
    return None
