"""Putting torchao's Adam on the user's own optimizer object, and taking it off again.

torchao computes a step in fp32 whatever the state and the weights are stored in
(https://github.com/pytorch/ao/blob/main/torchao/optim/adam.py).
"""

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from kpt_lightning.candidates.subject import Subject
from kpt_lightning.candidates.torch_optimizer import why_not

STATE_CLASSES = {"8bit": "AdamW8bit", "fp8": "AdamWFp8", "4bit": "AdamW4bit"}
"""Storage of the two moments to the class of ``torchao.optim`` that has it."""

FULL = "fp32"
"""Moments as they are: torchao's own class for that would store them in the dtype of the weights, and a second moment
in bf16 never decays, as 0.1 % of it is less than half a unit in its last place."""

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_OWN = ("block_size", "bf16_stochastic_round", "is_adamw", "_zero_grad_profile_name", "step")
_UNSET = object()


@dataclass(frozen=True, slots=True)
class Swapped:
    """What :func:`take_off` needs.

    Attributes:
        optimizer: The user's object.
        kind: Its class before.
        attributes: Those of its own that were set anew, as they were.
        steps: Parameter to the tensor that counted its steps.
    """

    optimizer: Optimizer
    kind: type[Optimizer]
    attributes: dict[str, Any]
    steps: dict[Tensor, Tensor]


def why_not_torchao(subject: Subject) -> str | None:
    """Why the optimizer cannot become torchao's, or None."""
    if reason := why_not(subject, kernels=False):
        return reason
    optimizer = subject.optimizer
    assert optimizer is not None
    if type(optimizer) not in (Adam, AdamW):
        return f"{type(optimizer).__name__} has no counterpart in torchao"
    groups = optimizer.param_groups
    if any(group["maximize"] for group in groups):
        return "maximize=True, which torchao does not have"
    if len({_decoupled(optimizer, group) for group in groups}) > 1:
        return "its groups differ in how weight decay is done"
    if any(type(each.data) is not Tensor for group in groups for each in group["params"]):
        return "its parameters are sharded"
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        return "its step was replaced on the object by another library"
    return None


def put_on(optimizer: Optimizer, storage: str, *, stochastic: bool = False) -> Swapped:
    """Let the object be torchao's Adam; parameter groups stay, and state is stored anew.

    Args:
        optimizer: One that :func:`why_not_torchao` found nothing against.
        storage: A key of :data:`STATE_CLASSES`, or :data:`FULL`.
        stochastic: Round bf16 weights up or down by chance, so that on average nothing is lost.
    """
    kind, block_size = torchao_class(storage)
    settings = {
        "block_size": block_size,
        "bf16_stochastic_round": stochastic,
        "is_adamw": _decoupled(optimizer, optimizer.param_groups[0]),
    }
    before = {name: vars(optimizer).get(name, _UNSET) for name in _OWN}
    steps = {each: state["step"] for each, state in optimizer.state.items() if "step" in state}
    stored = {each: _stored(kind, settings, each, state) for each, state in optimizer.state.items()}
    swapped = Swapped(optimizer, type(optimizer), before, steps)
    for each, state in stored.items():
        optimizer.state[each].update(state)
    vars(optimizer).update(settings)
    optimizer.__class__ = kind
    optimizer._patch_step_function()
    _follow_class(optimizer)
    return swapped


def take_off(swapped: Swapped) -> None:
    """The class before, and state as it stores it."""
    optimizer = swapped.optimizer
    scheduled = vars(optimizer).get("step")
    optimizer.__class__ = swapped.kind
    for name, value in swapped.attributes.items():
        vars(optimizer).pop(name, None)
        if value is not _UNSET:
            vars(optimizer)[name] = value
    if scheduled is not None and "step" not in vars(optimizer):
        # A scheduler that was made in between.
        vars(optimizer)["step"] = scheduled
        _follow_class(optimizer)
    fused = {each for group in optimizer.param_groups if group["fused"] for each in group["params"]}
    for each, state in optimizer.state.items():
        for name in _MOMENTS:
            if state.get(name) is not None:
                state[name] = plain(state[name]).to(each.dtype)
        if "step" in state:
            state["step"] = _step_before(state["step"], swapped.steps.get(each), each, each in fused)


def plain(value: Tensor) -> Tensor:
    """A moment as an ordinary tensor."""
    return value if type(value) is Tensor else value.dequantize()


@functools.cache
def torchao_class(storage: str) -> tuple[type[Any], float]:
    """A subclass of torchao's that fits an ordinary training loop, and its block size."""
    import torchao.optim
    from torchao.optim.adam import _AdamBase

    if storage == FULL:
        kind, block_size = _AdamBase, float("inf")
    else:
        kind = getattr(torchao.optim, STATE_CLASSES[storage])
        block_size = kind([torch.zeros(1, requires_grad=True)]).block_size

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        """Torchao's step takes learning rates as tensors; users and schedulers go on setting numbers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.as_tensor(rate, dtype=torch.float32)
            _AdamBase.step(self)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        return loss

    def add_param_group(self: Any, group: dict[str, Any]) -> None:
        """Past torchao's, which makes a tensor of the learning rate."""
        Optimizer.add_param_group(self, group)

    def state_dict(self: Any) -> dict[str, Any]:
        """With ordinary tensors on the host, so that a checkpoint loads without torchao and under any plan."""
        found: dict[str, Any] = Optimizer.state_dict(self)
        for key, state in found["state"].items():
            found["state"][key] = {name: plain(value).cpu() for name, value in state.items()}
        return found

    def load_state_dict(self: Any, saved: dict[str, Any]) -> None:
        """Of this class or of torch's own Adam; moments go into the storage of this class without a detour."""
        Optimizer.load_state_dict(self, saved)
        places = [place for group in saved["param_groups"] for place in group["params"]]
        own = [each for group in self.param_groups for each in group["params"]]
        for place, each in zip(places, own, strict=True):
            if place in saved["state"]:
                self.state[each].update(_stored(type(self), vars(self), each, saved["state"][place]))

    body = {
        "step": step,
        "add_param_group": add_param_group,
        "state_dict": state_dict,
        "load_state_dict": load_state_dict,
    }
    if storage == FULL:
        body["_new_buffer"] = lambda self, p, signed: torch.zeros_like(p, dtype=torch.float32)
    return type(f"Kpt{kind.__name__.lstrip('_')}", (kind,), body), block_size


def _stored(kind: type[Any], settings: Mapping[str, Any], each: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter as torchao stores it."""
    bare = object.__new__(kind)
    vars(bare).update(settings)
    found: dict[str, Any] = {}
    for name in _MOMENTS:
        if state.get(name) is not None:
            found[name] = bare._new_buffer(each, name == "exp_avg")
            found[name].copy_(plain(state[name]).to(each.device, torch.float32))
    if "step" in state:
        found["step"] = state["step"].to("cpu", torch.float32, copy=True)
    return found


def _step_before(now: Tensor, before: Tensor | None, each: Tensor, fused: bool) -> Tensor:
    """The step count where torch's own kernels want it."""
    if before is not None:
        return before.copy_(now)
    return now.to(each.device) if fused else now


def _decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    return type(optimizer) is AdamW or bool(group.get("decoupled_weight_decay"))


def _follow_class(optimizer: Optimizer) -> None:
    """A scheduler of torch binds ``step`` to the class of its time: bind it to that of the call."""
    if "step" not in vars(optimizer):
        return
    reference = weakref.ref(optimizer)

    def step(*args: Any, **kwargs: Any) -> Any:
        target: Any = reference()
        target._opt_called = True
        return type(target).step(target, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    vars(optimizer)["step"] = step
