"""Switching the user's own optimizer to torch's fused kernels, in place: one kernel for a step of many parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.candidates.torch_optimizer import why_not
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.gates import PARITY_FACTOR, PARITY_ULPS, Numerics
from kpt_lightning.validation.numerics import relative_error

# What their __init__ sets beside the groups: torch/optim/{adam,sgd,adagrad}.py of torch 2.11 and 2.13.
_AMP = "_step_supports_amp_scaling"
_CHECK = "_need_device_dtype_check_for_fused"
_UNSET = object()


@dataclass(frozen=True, slots=True)
class _Applied:
    optimizer: Optimizer
    default: Any
    groups: list[tuple[dict[str, Any], Any]]
    attributes: dict[str, Any]
    steps: dict[Tensor, Tensor]
    hooks: list[RemovableHandle]


class FusedOptimizer:
    """``fused=True`` for Adam, AdamW, SGD and Adagrad of torch; the optimizer object stays the same."""

    name = "fused_optimizer"
    level = Level.CONSERVATIVE
    stage = Stage.OPTIMIZER
    turn = 70
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ()
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change, after three steps of both kernels agreed on small parameters."""
        reason = why_not(subject) or _disagreement(subject.optimizer)
        if reason:
            return [Rejected(self.name, reason)]
        optimizer = subject.optimizer
        assert optimizer is not None
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        kind = type(optimizer).__name__
        text = f"{kind}(fused=True) updates {count} parameters in one pass; three steps of both kernels agree"
        return [Change(candidate=self.name, setting={"optimizer": kind}, reason=text)]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> _Applied:
        """Set what ``fused=True`` in its constructor sets; step counts move to where fused kernels read them.

        Its ``state_dict`` stays that of the user's own optimizer, and one that is loaded does not switch it back.
        """
        optimizer, reason = subject.optimizer, why_not(subject)
        if optimizer is None or reason:
            raise ConfigError("plan.fused_optimizer", setting.get("optimizer"), str(reason), "Make a new plan")
        steps = {each: state["step"] for each, state in optimizer.state.items() if "step" in state}
        moved = {each: step.to(each.device, torch.float32) for each, step in steps.items()}
        applied = _Applied(
            optimizer,
            optimizer.defaults["fused"],
            [(group, group["fused"]) for group in optimizer.param_groups],
            {name: vars(optimizer).get(name, _UNSET) for name in (_AMP, _CHECK)},
            steps,
            [
                optimizer.register_state_dict_post_hook(_saved_as_before(optimizer)),
                optimizer.register_load_state_dict_post_hook(_fused_again),
            ],
        )
        for each, step in moved.items():
            optimizer.state[each]["step"] = step
        optimizer.defaults["fused"] = True
        _fused_again(optimizer)
        setattr(optimizer, _AMP, True)
        if isinstance(optimizer, (SGD, Adagrad)):
            setattr(optimizer, _CHECK, True)
        return applied

    def undo(self, subject: Subject, applied: _Applied) -> None:
        """Back to the kernels that torch chose before; the state keeps what it learned."""
        optimizer = applied.optimizer
        for hook in applied.hooks:
            hook.remove()
        optimizer.defaults["fused"] = applied.default
        before = {id(group): fused for group, fused in applied.groups}
        for group in optimizer.param_groups:
            group["fused"] = before.get(id(group), applied.default)
        for name, value in applied.attributes.items():
            if value is _UNSET:
                vars(optimizer).pop(name, None)
            else:
                setattr(optimizer, name, value)
        for each, state in optimizer.state.items():
            if "step" in state:
                state["step"] = _unfused_step(state["step"], applied.steps.get(each))


CANDIDATE = FusedOptimizer()


def _saved_as_before(optimizer: Optimizer) -> Callable[[Optimizer, dict[str, Any]], dict[str, Any]]:
    """A state dict that loads where nothing of this package is: the user's own flags, step counts on the host."""
    given = [group["fused"] for group in optimizer.param_groups]
    default = optimizer.defaults["fused"]

    def save(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [
            group | {"fused": given[number] if number < len(given) else default}
            for number, group in enumerate(state_dict["param_groups"])
        ]
        state = {
            key: each | {"step": _unfused_step(each["step"].clone(), None)} if "step" in each else each
            for key, each in state_dict["state"].items()
        }
        return state_dict | {"param_groups": groups, "state": state}

    return save


def _fused_again(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["fused"] = True
    for each, state in optimizer.state.items():
        if "step" in state:
            state["step"] = state["step"].to(each.device, torch.float32)


def _unfused_step(now: Tensor, before: Tensor | None) -> Tensor:
    """The step count where unfused kernels want it: in the tensor that they had, else in a new one on the host."""
    if before is None:
        # torch/optim/optimizer.py, _get_scalar_dtype.
        return now.to("cpu", torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32)
    return before if before is now else before.copy_(now)


def _disagreement(optimizer: Optimizer | None) -> str | None:
    """Three steps of fused and unfused kernels on small parameters of each group, judged against float64."""
    assert optimizer is not None
    for group in optimizer.param_groups:
        hyper = {name: value for name, value in group.items() if name in optimizer.defaults}
        for dtype in {each.dtype for each in group["params"]}:
            device = group["params"][0].device
            try:
                fused = _three_steps(type(optimizer), hyper | {"fused": True}, dtype, device)
            except (RuntimeError, NotImplementedError) as error:
                return f"torch has no such kernel for {dtype} on {device.type}: {str(error).splitlines()[0]}"
            exact = _three_steps(type(optimizer), hyper | {"foreach": False}, torch.float64, device)
            own = _three_steps(type(optimizer), hyper | {"foreach": False}, dtype, device)
            for name in exact:
                off, least = relative_error(exact[name], fused[name]), relative_error(exact[name], own[name])
                if not off <= max(PARITY_FACTOR * least, PARITY_ULPS * torch.finfo(dtype).eps, _beta_rounding(hyper)):
                    return f"fused, {name} is {off:.1e} off in {dtype} after three steps, and unfused {least:.1e}"
    return None


def _beta_rounding(hyper: Mapping[str, Any]) -> float:
    """Twice the relative error of 1 - beta where beta is rounded to float32 first, as torch's CUDA kernels do.

    For 0.999 it is 1.3e-5, and so is what an H200 adds to exp_avg_sq: aten/src/ATen/native/cuda/fused_adam_utils.cuh.
    """
    betas = [float(beta) for beta in hyper.get("betas", ())]
    rounded = [float(torch.tensor(beta, dtype=torch.float32)) for beta in betas]
    return max((2 * abs(near - beta) / (1 - beta) for beta, near in zip(betas, rounded, strict=True)), default=0.0)


def _three_steps(
    kind: type[Optimizer], hyper: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Parameter and state after three steps.

    The learning rate is 0.1 whatever the user's is: at a small one, rounding would hide a wrong update.
    """
    random = torch.Generator().manual_seed(0)
    draws = [torch.randn(4, 33, generator=random, dtype=torch.float64) for _ in range(4)]
    weight = nn.Parameter(draws[0].to(device, dtype))
    # Adam's own constructor takes what makes it AdamW; AdamW's does not.
    known = {name: value for name, value in hyper.items() if not (kind is AdamW and name == "decoupled_weight_decay")}
    optimizer = kind([weight], **{**known, "lr": 0.1})
    for gradient in draws[1:]:
        weight.grad = gradient.to(device, dtype)
        optimizer.step()
    state = {name: value.cpu() for name, value in optimizer.state[weight].items() if isinstance(value, Tensor)}
    return {"parameter": weight.detach().cpu(), **state}
