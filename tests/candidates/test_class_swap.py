"""A swapped module is the same object with other code, and is put back exactly."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.candidates.class_swap import swap_all, swap_back, swapped_class, swapped_copy, why_not_swap
from kpt_lightning.errors import ConfigError


def doubled(self: nn.Module, x: Tensor) -> Tensor:
    return x * self.kpt_settings


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU())


def facts(net: nn.Module) -> list[Any]:
    return [(type(each), list(vars(each)), [id(value) for value in vars(each).values()]) for each in net.modules()]


def test_the_new_code_runs_and_undo_leaves_no_trace() -> None:
    net = model()
    before, keys = facts(net), list(net.state_dict())
    x = torch.randn(2, 4)
    plain = net(x)

    applied = swap_all(net, doubled, {"1": 2.0, "2": 3.0}, "test")
    assert torch.equal(net(x), 6 * net[0](x))
    assert isinstance(net[1], nn.ReLU)
    assert list(net.state_dict()) == keys

    swap_back(applied)
    assert facts(net) == before
    assert torch.equal(net(x), plain)


def test_there_is_one_class_for_all_modules() -> None:
    net = model()
    swap_all(net, doubled, {"1": 2.0, "2": 3.0}, "test")

    assert type(net[1]) is type(net[2]) is swapped_class(nn.ReLU, doubled)
    assert type(net[1]).__name__ == "FusedReLU"


@pytest.mark.parametrize("through", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_keeps_the_code_and_shares_no_weights(through: Any) -> None:
    net = model()
    swap_all(net, doubled, {"0": 2.0}, "test")
    other = through(net)

    assert type(other[0]) is type(net[0])
    assert other[0].weight is not net[0].weight
    x = torch.randn(2, 4)
    assert torch.equal(other(x), net(x))
    swap_back([net[0]])
    assert torch.equal(other[0](x), 2 * x)


def test_a_swapped_copy_shares_parameters_and_leaves_the_module_alone() -> None:
    layer = nn.Linear(4, 4)
    twin = swapped_copy(layer, doubled, 2.0)

    assert twin.weight is layer.weight
    assert type(layer) is nn.Linear
    assert "kpt_settings" not in vars(layer)
    assert torch.equal(twin(torch.ones(4)), torch.full((4,), 2.0))


def test_hooks_of_the_user_still_run() -> None:
    net = model()
    seen: list[Any] = []
    net[1].register_forward_hook(lambda *_: seen.append("forward"))
    net[1].register_full_backward_hook(lambda *_: seen.append("backward"))
    swap_all(net, doubled, {"1": 2.0}, "test")

    net(torch.randn(2, 4)).sum().backward()
    assert seen == ["forward", "backward"]


def _compiled() -> nn.Module:
    layer = nn.ReLU()
    layer.compile(backend="eager")
    return layer


def _patched() -> nn.Module:
    layer = nn.ReLU()
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def _swapped() -> nn.Module:
    layer = nn.ReLU()
    swap_all(nn.Sequential(layer), doubled, {"0": 2.0}, "test")
    return layer


@pytest.mark.parametrize(
    ("make", "reason"), [(_compiled, "compiled by the user"), (_patched, "on the object"), (_swapped, "already")]
)
def test_what_somebody_else_changed_is_left_alone(make: Any, reason: str) -> None:
    layer = make()
    assert reason in str(why_not_swap(layer))

    net = nn.Sequential(nn.ReLU(), layer)
    with pytest.raises(ConfigError, match=r"test='1'.*Make a new plan"):
        swap_all(net, doubled, {"0": 2.0, "1": 2.0}, "test")
    assert type(net[0]) is nn.ReLU


def test_an_unknown_name_changes_nothing() -> None:
    net = model()
    before = facts(net)
    with pytest.raises(ConfigError, match="no such module"):
        swap_all(net, doubled, {"1": 2.0, "9": 2.0}, "test")
    assert facts(net) == before
