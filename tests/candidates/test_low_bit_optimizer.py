import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.low_bit_optimizer import CANDIDATE, saved_state_bytes, update_db
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.candidates.torchao_adam import put_on, take_off
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.optional import TORCHAO
from kpt_lightning.validation.numerics import sqnr_db

needs_torchao = pytest.mark.skipif(not TORCHAO.available(), reason=TORCHAO.available().reason)
pytestmark = [
    # torch and torchao warn of each other.
    pytest.mark.filterwarnings("ignore:OptimState.* does not implement _stable_hash_for_caching:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchao"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
    # torch's advice while it compiles for a GPU.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def network(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(device)


def subject(model: nn.Module, optimizer: Optimizer | None, goal: Any = "memory") -> Subject:
    device = next(model.parameters()).device
    return Subject(model=model, profile=detect(), config=KptConfig(), device=device, optimizer=optimizer, goal=goal)


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).device)
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([each.detach().cpu().double().flatten() for each in model.parameters()])


def facts(optimizer: Optimizer) -> tuple[Any, ...]:
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    own = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups", "defaults")}
    return type(optimizer), groups, copy.deepcopy(optimizer.defaults), own


def reason(answer: Any) -> str:
    (only,) = answer
    assert isinstance(only, Rejected)
    return only.reason


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@needs_torchao
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("storage", ["8bit", "4bit"])
@pytest.mark.parametrize("fused", [None, True])
def test_training_goes_on_in_few_bits_and_goes_back(storage: str, device: str, fused: bool | None) -> None:
    model, plain = network(device), network(device)
    optimizer, exact = (AdamW(each.parameters(), lr=0.01, fused=fused) for each in (model, plain))
    train(model, optimizer, 2)
    train(plain, exact, 2)
    before, start = facts(optimizer), weights(model)
    on = subject(model, optimizer)
    applied = CANDIDATE.apply(on, {"storage": storage})
    assert isinstance(optimizer, AdamW) is False
    moment = optimizer.state[model[0].weight]["exp_avg"]
    assert moment.codes.numel() * moment.codes.element_size() == 64 * 128 // (2 if storage == "4bit" else 1)
    train(model, optimizer, 4)
    train(plain, exact, 4)
    assert sqnr_db(weights(plain) - start, weights(model) - start) > 10
    CANDIDATE.undo(on, applied)
    assert facts(optimizer) == before
    state, wanted = optimizer.state[model[0].weight], exact.state[plain[0].weight]
    for name, value in wanted.items():
        assert (type(state[name]), state[name].dtype, state[name].device) == (Tensor, value.dtype, value.device)
    assert float(state["step"]) == 6
    assert sqnr_db(wanted["exp_avg"], state["exp_avg"]) > 8
    train(model, optimizer, 1)


@needs_torchao
def test_state_made_in_between_suits_torchs_own_kernels_afterwards() -> None:
    model = network()
    optimizer = Adam(model.parameters(), lr=0.01)
    on = subject(model, optimizer)
    applied = CANDIDATE.apply(on, {"storage": "8bit"})
    train(model, optimizer, 2)
    CANDIDATE.undo(on, applied)
    assert all(type(value) is Tensor for state in optimizer.state.values() for value in state.values())
    train(model, optimizer, 1)
    assert float(optimizer.state[model[0].weight]["step"]) == 3


@needs_torchao
@pytest.mark.parametrize("when", ["before", "while"])
def test_schedulers_and_plain_numbers_set_the_learning_rate(when: str) -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.5)
    on = subject(model, optimizer)
    if when == "before":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    applied = CANDIDATE.apply(on, {"storage": "8bit"})
    if when == "while":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.param_groups[0]["lr"] = 0.0
    start = weights(model)
    train(model, optimizer, 1)
    assert torch.equal(weights(model), start)
    CANDIDATE.undo(on, applied)
    optimizer.param_groups[0]["lr"] = 0.01
    train(model, optimizer, 1)
    scheduler.step()
    assert not torch.equal(weights(model), start)
    assert all(type(value) is Tensor for state in optimizer.state.values() for value in state.values())


@needs_torchao
def test_a_closure_runs_once_with_gradients_and_its_loss_comes_back() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    put_on(optimizer, "8bit")
    ran = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 64)).square().mean()
        loss.backward()
        ran.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is ran[0]
    assert len(ran) == 1


@needs_torchao
def test_checkpoints_hold_ordinary_tensors_and_load_with_and_without_torchao() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.01)
    put_on(optimizer, "8bit")
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    values = [value for state in saved["state"].values() for value in state.values()]
    assert all(type(value) is Tensor and value.device.type == "cpu" for value in values)
    plain = AdamW(network().parameters())
    plain.load_state_dict(copy.deepcopy(saved))
    other = AdamW(network().parameters())
    put_on(other, "8bit")
    other.load_state_dict(plain.state_dict())
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert type(one["exp_avg"]) is type(two["exp_avg"])
        assert float(one["step"]) == float(two["step"]) == 2


@needs_torchao
@pytest.mark.parametrize(("storage", "least"), [("8bit", 30.0), ("4bit", 12.0), ("fp32", 90.0)])
def test_five_steps_are_as_near_as_the_storage_allows(storage: str, least: float) -> None:
    assert update_db(storage, torch.device("cpu")) > least


@needs_torchao
def test_what_is_saved_is_counted_for_large_trained_parameters_alone() -> None:
    model = network()
    model[2].requires_grad_(False)
    optimizer = AdamW(model.parameters())
    assert saved_state_bytes(optimizer, "8bit") == int(0.95 * 2 * 64 * 128 * (4 - 1 - 4 / 256))
    assert saved_state_bytes(optimizer, "4bit") == int(0.95 * 2 * 64 * 128 * (4 - 0.5 - 4 / 128))


@needs_torchao
def test_a_failure_half_way_leaves_the_optimizer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1)
    from torchao.optim import AdamW8bit

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(AdamW8bit, "_subclass_zeros", staticmethod(fail))
    before, state = facts(optimizer), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(torch.OutOfMemoryError):
        put_on(optimizer, "8bit")
    assert facts(optimizer) == before
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"])


def replaced_step(model: nn.Module) -> Optimizer:
    optimizer = AdamW(model.parameters())
    optimizer.step = lambda: None
    return optimizer


def two_ways(model: nn.Module) -> Optimizer:
    groups = [{"params": model[0].parameters(), "decoupled_weight_decay": True}, {"params": model[2].parameters()}]
    return Adam(groups)


DECLINED = {
    "none": (lambda m: None, "not known"),
    "sgd": (lambda m: SGD(m.parameters()), "no counterpart"),
    "maximize": (lambda m: AdamW(m.parameters(), maximize=True), "maximize=True"),
    "capturable": (lambda m: AdamW(m.parameters(), capturable=True), "capturable=True"),
    "replaced": (replaced_step, "step was replaced"),
    "two ways": (two_ways, "how weight decay is done"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_torchao_does_not_have_is_declined(case: str) -> None:
    make, why = DECLINED[case]
    model = network()
    on = subject(model, make(model))
    assert why in reason(CANDIDATE.applies(on))
    with pytest.raises(ConfigError, match="Make a new plan"):
        CANDIDATE.apply(on, {"storage": "8bit"})


def test_nothing_is_proposed_where_memory_is_not_short_or_is_the_hosts() -> None:
    model = network()
    assert "memory is not short" in reason(CANDIDATE.applies(subject(model, AdamW(model.parameters()), "speed")))
    assert "none of a GPU's memory" in reason(CANDIDATE.applies(subject(model, AdamW(model.parameters()))))


@needs_torchao
@pytest.mark.cuda
def test_on_cuda_each_storage_is_proposed_and_saves_what_it_promises() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(8)]).cuda()
    optimizer = AdamW(model.parameters())
    on = subject(model, optimizer)
    answers = CANDIDATE.applies(on)
    assert [each.setting["storage"] for each in answers if isinstance(each, Change)][:1] == ["8bit"]
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    for each in answers:
        if isinstance(each, Change):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            applied = put_on(optimizer, each.setting["storage"])
            optimizer.step()
            assert before - torch.cuda.memory_allocated() >= each.saves_bytes
            take_off(applied)
