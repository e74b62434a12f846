from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from kpt_lightning.candidates.bf16_weights import CANDIDATE
from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.optional import TORCHAO
from kpt_lightning.validation.numerics import sqnr_db

needs_torchao = pytest.mark.skipif(not TORCHAO.available(), reason=TORCHAO.available().reason)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchao"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
    # torch's advice while it compiles for a GPU.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def network(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 32), nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).to(
        device
    )


def subject(model: nn.Module, optimizer: Optimizer | None, **known: Any) -> Subject:
    known = {"compute_dtype": torch.bfloat16, **known}
    device = next(model.parameters()).device
    return Subject(model=model, profile=detect(), config=KptConfig(), device=device, optimizer=optimizer, **known)


def loss(model: nn.Module) -> Tensor:
    device = next(model.parameters()).device
    ids = torch.randint(0, 10, (16, 4), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        return model(ids).float().square().mean()


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def facts(model: nn.Module) -> list[Any]:
    return [(name, id(each), each.dtype, each.stride(), each.requires_grad) for name, each in model.named_parameters()]


def reason(answer: Any) -> str:
    (only,) = answer
    assert isinstance(only, Rejected)
    return only.reason


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@needs_torchao
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_was_not_trained_in_between_gets_every_bit_back(device: str) -> None:
    model = network(device)
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 1)
    exact, before = [each.detach().clone() for each in model.parameters()], facts(model)
    on = subject(model, optimizer)
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change)
    plain = loss(model).detach()
    applied = CANDIDATE.apply(on, Change.from_dict(change.to_dict()).setting)
    assert all(each.dtype == each.grad.dtype == torch.bfloat16 for each in model.parameters())
    changed = loss(model)
    changed.backward()
    assert abs(float(changed.detach()) / float(plain) - 1) < 0.05
    CANDIDATE.undo(on, applied)
    assert facts(model) == before
    assert type(optimizer) is AdamW
    for one, other in zip(exact, model.parameters(), strict=True):
        assert torch.equal(one, other)


@needs_torchao
@pytest.mark.parametrize("device", DEVICES)
def test_training_follows_that_with_fp32_weights_and_undo_keeps_what_was_learned(device: str) -> None:
    model, plain = network(device), network(device)
    optimizer, exact = (AdamW(each.parameters(), lr=0.01) for each in (model, plain))
    on = subject(model, optimizer)
    applied = CANDIDATE.apply(on, {})
    train(model, optimizer, 20)
    train(plain, exact, 20)
    assert all(each["exp_avg_sq"].dtype == torch.float32 for each in optimizer.state.values())
    learned = [each.detach().float() for each in model.parameters()]
    CANDIDATE.undo(on, applied)
    for one, other in zip(learned, model.parameters(), strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other.detach().bfloat16().float())
    start = torch.cat([each.flatten() for each in network().parameters()])
    moved, wanted = (torch.cat([each.detach().cpu().flatten() for each in m.parameters()]) for m in (model, plain))
    assert sqnr_db(wanted - start, moved - start) > 10
    ends = [float(loss(each).detach()) for each in (model, plain, network(device))]
    assert abs(ends[0] - ends[1]) < 0.1 * ends[2]


@needs_torchao
def test_updates_below_half_a_unit_in_the_last_place_are_not_lost() -> None:
    model = nn.Linear(64, 256, bias=False)
    nn.init.ones_(model.weight)
    optimizer = AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    on = subject(model, optimizer)
    CANDIDATE.apply(on, {})
    torch.manual_seed(0)
    for _ in range(40):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    # A step is 1e-4 and half a unit below one is 2e-3: rounding to nearest would stay at one.
    assert float(model.weight.detach().float().mean()) == pytest.approx(1 - 40e-4, abs=4e-4)


@needs_torchao
def test_memory_is_promised_where_it_is_the_goal() -> None:
    model = network()
    count = sum(each.numel() for each in model.parameters())
    optimizer = AdamW(model.parameters())
    assert CANDIDATE.applies(subject(model, optimizer, goal="memory"))[0].saves_bytes == 2 * count
    assert CANDIDATE.applies(subject(model, optimizer))[0].saves_bytes is None


def half(model: nn.Module) -> Optimizer:
    return AdamW(model[2].parameters())


DECLINED = {
    "fp32": (lambda m: subject(m, AdamW(m.parameters()), compute_dtype=torch.float32), "need bf16 autocast"),
    "no optimizer": (lambda m: subject(m, None), "not known"),
    "sgd": (lambda m: subject(m, SGD(m.parameters())), "no counterpart"),
    "bf16": (lambda m: subject(m.bfloat16(), AdamW(m.parameters())), "no weight is fp32"),
    "two optimizers": (lambda m: subject(m, half(m)), "'0.weight' is trained by another"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_cannot_be_cast_is_declined_with_the_reason_and_left_alone(case: str) -> None:
    make, why = DECLINED[case]
    model = network()
    on = make(model)
    before = facts(model)
    assert why in reason(CANDIDATE.applies(on))
    with pytest.raises(ConfigError, match="Make a new plan"):
        CANDIDATE.apply(on, {})
    assert facts(model) == before


def test_a_host_without_room_for_the_copy_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    model = network()
    assert "are free" in reason(CANDIDATE.applies(subject(model, AdamW(model.parameters()))))
