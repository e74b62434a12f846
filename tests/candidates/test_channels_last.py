import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.channels_last import CANDIDATE
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 6, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


def subject(model: nn.Module, **known: Any) -> Subject:
    device = next(model.parameters()).device
    return Subject(model=model, profile=detect(), config=KptConfig(), device=device, **known)


def data(model: nn.Module) -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()))


def results(model: nn.Module) -> list[Tensor]:
    loss = model(data(model)).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def facts(model: nn.Module) -> list[Any]:
    return [(name, id(each), each.stride(), each.requires_grad) for name, each in model.named_parameters()]


def reason(answer: Any) -> str:
    (only,) = answer
    assert isinstance(only, Rejected)
    return only.reason


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_the_numbers_stay_and_undo_restores_every_stride_and_bit(device: str) -> None:
    model = network().to(device, torch.float64)  # no TF32, so that one tolerance serves all devices
    on = subject(model)
    exact, before, weights = results(model), facts(model), copy.deepcopy(model.state_dict())
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change)
    assert change.setting == {"modules": ["0", "3", "4"]}
    applied = CANDIDATE.apply(on, Change.from_dict(change.to_dict()).setting)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(exact, results(model), strict=True):
        torch.testing.assert_close(one, other)
    CANDIDATE.undo(on, applied)
    assert facts(model) == before
    for name, each in model.state_dict().items():
        assert name.startswith("1.") or torch.equal(each, weights[name])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_activations_follow_the_weights(device: str) -> None:
    model = network().to(device)
    on = subject(model)
    assert model[0](data(model)).is_contiguous()
    CANDIDATE.apply(on, CANDIDATE.applies(on)[0].setting)
    assert model[0](data(model)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_and_optimizer_state_take_the_layout_of_their_weight(foreach: bool) -> None:
    model, plain = network(), network()
    optimizer, exact = (torch.optim.SGD(each.parameters(), 0.1, 0.9, foreach=foreach) for each in (model, plain))
    on = subject(model, optimizer=optimizer)

    def step(net: nn.Module, by: torch.optim.Optimizer) -> None:
        net(data(net)).square().mean().backward()
        by.step()

    step(model, optimizer)
    step(plain, exact)
    strides = [value.stride() for state in optimizer.state.values() for value in state.values()]
    applied = CANDIDATE.apply(on, CANDIDATE.applies(on)[0].setting)
    for each, state in optimizer.state.items():
        assert each.grad.stride() == each.stride() == state["momentum_buffer"].stride()
    step(model, optimizer)
    step(plain, exact)
    CANDIDATE.undo(on, applied)
    assert [value.stride() for state in optimizer.state.values() for value in state.values()] == strides
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_weight_shared_by_two_layers_is_laid_out_once_and_stays_shared() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    on = subject(model)
    before = facts(model)
    applied = CANDIDATE.apply(on, CANDIDATE.applies(on)[0].setting)
    assert model[0].weight is model[1].weight
    CANDIDATE.undo(on, applied)
    assert facts(model) == before


def test_a_copy_of_the_changed_model_keeps_its_layout_when_the_original_goes_back() -> None:
    model = network()
    on = subject(model)
    applied = CANDIDATE.apply(on, CANDIDATE.applies(on)[0].setting)
    other = copy.deepcopy(model)
    CANDIDATE.undo(on, applied)
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous(memory_format=torch.channels_last)


def own_strides() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    model[0].weight.data = model[0].weight.data.transpose(2, 3)
    return model


def view_of_a_buffer() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    model[0].weight.data = torch.zeros(1000)[: 8 * 4 * 9].view(8, 4, 3, 3)
    return model


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), nn.Conv1d(2, 2, 1))


DECLINED = {
    "no convolution": (lambda: nn.Linear(2, 2), "no 2-D convolution"),
    "computed weight": (weight_norm, "no 2-D convolution"),
    "in this order": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)).to(memory_format=torch.channels_last), "already"),
    "one by one": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1)), "already"),
    "own strides": (own_strides, "strides"),
    "view": (view_of_a_buffer, "larger buffer"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_cannot_be_laid_out_is_declined_with_the_reason(case: str) -> None:
    make, why = DECLINED[case]
    assert why in reason(CANDIDATE.applies(subject(make())))


def test_a_stored_setting_for_another_model_is_refused_and_nothing_changes() -> None:
    model = network()
    before = facts(model)
    with pytest.raises(ConfigError, match="no 2-D convolution of this model"):
        CANDIDATE.apply(subject(model), {"modules": ["0", "7"]})
    assert facts(model) == before
