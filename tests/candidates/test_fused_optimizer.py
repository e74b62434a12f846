import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from kpt_lightning.candidates import fused_optimizer
from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.fused_optimizer import CANDIDATE
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect

Make = Callable[[list[nn.Parameter]], Optimizer]

KINDS: dict[str, Make] = {
    "adam": lambda p: Adam(p, lr=0.01),
    "adam amsgrad, decay": lambda p: Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw maximize": lambda p: AdamW(p, lr=0.01, maximize=True),
    "adamw, tensor rate": lambda p: AdamW(p, lr=torch.tensor(0.01)),
    "sgd": lambda p: SGD(p, lr=0.01),
    "sgd nesterov": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": lambda p: Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def subject(model: nn.Module, optimizer: Optimizer | None, **known: Any) -> Subject:
    device = next(model.parameters()).device
    return Subject(model=model, profile=detect(), config=KptConfig(), device=device, optimizer=optimizer, **known)


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).device)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def facts(optimizer: Optimizer) -> tuple[Any, ...]:
    """All that the candidate may touch, with the identity of what it must not replace."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    places = [
        (name, id(value), value.device, value.dtype)
        for state in optimizer.state.values()
        for name, value in state.items()
    ]
    own = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups", "defaults")}
    return copy.deepcopy(groups), copy.deepcopy(optimizer.defaults), places, own


def reason(answer: Any) -> str:
    (only,) = answer
    assert isinstance(only, Rejected)
    return only.reason


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@pytest.mark.parametrize("made", KINDS)
@pytest.mark.parametrize("before", [0, 2], ids=["new", "with state"])
def test_fused_steps_give_the_parameters_of_unfused_ones_and_undo_leaves_no_trace(made: str, before: int) -> None:
    plain, changed = network(), network()
    exact, optimizer = KINDS[made](list(plain.parameters())), KINDS[made](list(changed.parameters()))
    train(plain, exact, before)
    train(changed, optimizer, before)
    on = subject(changed, optimizer)
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change)
    start = facts(optimizer)
    applied = CANDIDATE.apply(on, Change.from_dict(change.to_dict()).setting)
    assert all(group["fused"] is True for group in optimizer.param_groups)
    assert optimizer._step_supports_amp_scaling is True
    CANDIDATE.undo(on, applied)
    assert facts(optimizer) == start
    applied = CANDIDATE.apply(on, change.setting)
    train(changed, optimizer, 3)
    CANDIDATE.undo(on, applied)
    train(plain, exact, 3)
    for one, other in zip(plain.parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    train(plain, exact, 2)
    train(changed, optimizer, 2)
    for one, other in zip(plain.parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_fused_kernel_really_runs() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    CANDIDATE.apply(subject(model, optimizer), {})
    train(model, optimizer, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, 1)
    assert "aten::_fused_adamw_" in {event.key for event in profile.key_averages()}


def test_a_group_added_while_fused_is_fused_and_goes_back_with_the_others() -> None:
    model, more = network(), nn.Parameter(torch.zeros(3))
    optimizer = Adam(model.parameters())
    on = subject(model, optimizer)
    applied = CANDIDATE.apply(on, {})
    optimizer.add_param_group({"params": [more]})
    assert optimizer.param_groups[1]["fused"] is True
    CANDIDATE.undo(on, applied)
    assert [group["fused"] for group in optimizer.param_groups] == [None, None]


def test_a_scheduler_made_before_goes_on_working() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    on = subject(model, optimizer)
    assert isinstance(CANDIDATE.applies(on)[0], Change)
    CANDIDATE.apply(on, {})
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


class Own(AdamW):
    pass


def with_sparse(model: nn.Module) -> nn.Module:
    model.append(nn.Embedding(4, 4, sparse=True))
    return model


def with_strange_state(optimizer: Optimizer) -> Optimizer:
    each = optimizer.param_groups[0]["params"][0]
    optimizer.state[each] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros_like(each)}
    return optimizer


DECLINED: dict[str, tuple[Callable[[nn.Module], Optimizer | None], str]] = {
    "none": (lambda m: None, "not known"),
    "subclass": (lambda m: Own(m.parameters()), "none of Adam"),
    "other": (lambda m: torch.optim.RMSprop(m.parameters()), "none of Adam"),
    "fused": (lambda m: AdamW(m.parameters(), fused=True), "fused=True was set by you"),
    "not fused": (lambda m: AdamW(m.parameters(), fused=False), "fused=False was set by you"),
    "foreach": (lambda m: AdamW(m.parameters(), foreach=True), "foreach=True was set by you"),
    "differentiable": (lambda m: Adam(m.parameters(), differentiable=True), "differentiable=True"),
    "capturable": (lambda m: Adam(m.parameters(), capturable=True), "capturable=True"),
    "sparse": (lambda m: Adam(with_sparse(m).parameters()), "sparse"),
    "complex": (lambda m: Adam([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), "complex64"),
    "devices": (lambda m: Adam([*m.parameters(), nn.Parameter(torch.zeros(2, device="meta"))]), "cpu, meta"),
    "state": (lambda m: with_strange_state(Adam(m.parameters())), "'exp_avg' differs"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_cannot_be_fused_is_declined_with_the_reason_and_left_alone(case: str) -> None:
    make, why = DECLINED[case]
    model = network()
    optimizer = make(model)
    on = subject(model, optimizer)
    before = None if optimizer is None else facts(optimizer)
    assert why in reason(CANDIDATE.applies(on))
    with pytest.raises(ConfigError, match="Make a new plan"):
        CANDIDATE.apply(on, {"optimizer": "Adam"})
    assert optimizer is None or facts(optimizer) == before


def test_a_gradient_scaler_is_not_surprised() -> None:
    model = network()
    on = subject(model, Adam(model.parameters()), compute_dtype=torch.float16)
    assert "gradient scaler" in reason(CANDIDATE.applies(on))


def test_a_kernel_that_is_wrong_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fused_optimizer._three_steps

    def wrong(kind: type[Optimizer], hyper: Any, *rest: Any) -> dict[str, Tensor]:
        return real(kind, {**hyper, "weight_decay": 0.02} if hyper.get("fused") else hyper, *rest)

    monkeypatch.setattr(fused_optimizer, "_three_steps", wrong)
    model = network()
    assert "parameter is" in reason(CANDIDATE.applies(subject(model, AdamW(model.parameters()))))


@pytest.mark.cuda
@pytest.mark.parametrize("made", ["adam amsgrad, decay", "adamw maximize", "sgd nesterov"])
def test_on_cuda_step_counts_move_to_the_device_and_back(made: str) -> None:
    plain, changed = network().cuda(), network().cuda()
    exact, optimizer = KINDS[made](list(plain.parameters())), KINDS[made](list(changed.parameters()))
    train(plain, exact, 2)
    train(changed, optimizer, 2)
    on = subject(changed, optimizer)
    assert isinstance(CANDIDATE.applies(on)[0], Change)
    start = facts(optimizer)
    applied = CANDIDATE.apply(on, {})
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert all(step.device.type == "cuda" for step in steps)
    train(changed, optimizer, 2)
    CANDIDATE.undo(on, applied)
    assert facts(optimizer) == start
    train(plain, exact, 2)
    for one, other in zip(plain.parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_judged_by_their_own_rounding(dtype: torch.dtype, device: str) -> None:
    model = network().to(device, dtype)
    assert isinstance(CANDIDATE.applies(subject(model, AdamW(model.parameters())))[0], Change)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_checkpoint_of_the_run_is_the_users_own_and_loading_one_does_not_switch_back(kind: Any) -> None:
    states = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        optimizer = kind(model.parameters(), lr=0.1)
        about = subject(model, optimizer)
        applied = CANDIDATE.apply(about, {"optimizer": kind.__name__}) if fused else None
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        states.append(optimizer.state_dict())
        if fused:
            assert [group["fused"] for group in optimizer.param_groups] == [True]
            optimizer.load_state_dict(states[0])
            assert [group["fused"] for group in optimizer.param_groups] == [True]
            CANDIDATE.undo(about, applied)
            states.append(optimizer.state_dict())
    plain, running, undone = states
    for other in (running, undone):
        assert other["param_groups"] == plain["param_groups"]
        for key, each in plain["state"].items():
            for name, value in each.items():
                got = other["state"][key][name]
                assert (got.dtype, got.device) == (value.dtype, value.device)
                assert torch.allclose(got, value)
    fresh = kind(nn.Linear(4, 4).parameters(), lr=0.1)
    fresh.load_state_dict(running)
    assert fresh.param_groups[0]["fused"] is None
