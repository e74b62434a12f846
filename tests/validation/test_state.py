"""Running a model inside ``preserved`` leaves no trace: every claim is checked bit for bit."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.validation.state import preserved, seed_all
from tests.validation.stateful import HasState, described


def rng() -> tuple[Any, ...]:
    return random.getstate(), torch.get_rng_state().tolist(), repr(np.random.get_state())


@pytest.mark.parametrize("how", [None, ValueError, KeyboardInterrupt])
def test_attributes_buffers_flags_and_modes_are_what_they_were(how: type[BaseException] | None) -> None:
    model = HasState()
    before = described(model)

    def run() -> None:
        with preserved(model):
            model(torch.ones(2, 4)).sum().backward()
            model.linear.weight.grad = None
            assert described(model) != before
            if how is not None:
                raise how

    if how is None:
        run()
    else:
        with pytest.raises(how):
            run()
    assert described(model) == before


def test_the_state_is_put_back_each_time() -> None:
    model = HasState()
    before = described(model)
    for _ in range(3):
        with preserved(model), preserved(model):
            model(torch.ones(2, 4))
        assert described(model) == before


@pytest.mark.parametrize("how", [None, ValueError, KeyboardInterrupt])
def test_random_state_of_python_numpy_and_torch_is_put_back(how: type[BaseException] | None) -> None:
    before = rng()
    try:
        with preserved(nn.Linear(2, 2)):
            seed_all(3)
            random.random(), torch.rand(5), np.random.rand(5)
            if how is not None:
                raise how
    except (ValueError, KeyboardInterrupt):
        pass
    # Making the layer draws; so do not compare with what was before it.
    with preserved(nn.Identity()):
        now = rng()
    assert rng() == now
    assert before != now


def test_equal_seeds_give_equal_draws_everywhere() -> None:
    draws = []
    for _ in range(2):
        with preserved(nn.Identity()):
            seed_all(7)
            draws.append((random.random(), torch.rand(3).tolist(), np.random.rand(3).tolist()))
    assert draws[0] == draws[1]


@pytest.mark.cuda
def test_random_state_of_cuda_is_put_back() -> None:
    torch.rand(1, device="cuda")
    before = [each.tolist() for each in torch.cuda.get_rng_state_all()]
    with preserved(nn.Identity()):
        seed_all(1)
        torch.rand(8, device="cuda")
    assert [each.tolist() for each in torch.cuda.get_rng_state_all()] == before


@pytest.mark.parametrize("how", [None, ValueError, KeyboardInterrupt])
def test_gradients_are_the_same_tensor_objects_with_the_same_content(how: type[BaseException] | None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0](torch.ones(2, 4)).sum().backward()
    grads = [each.grad for each in model.parameters()]
    content = [None if each is None else each.clone() for each in grads]
    assert grads[0] is not None
    assert grads[2] is None
    try:
        with preserved(model):
            assert all(each.grad is None for each in model.parameters())
            model(torch.ones(2, 4)).square().sum().backward()
            assert all(each.grad is not None for each in model.parameters())
            if how is not None:
                raise how
    except (ValueError, KeyboardInterrupt):
        pass
    for each, grad, copy in zip(model.parameters(), grads, content, strict=True):
        assert each.grad is grad
        assert copy is None or torch.equal(grad, copy)  # type: ignore[arg-type]


def test_a_leaf_that_is_no_parameter_keeps_its_gradient() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(3, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = Scaled()
    model(torch.ones(3)).sum().backward()
    grad = model.scale.grad
    assert grad is not None
    with preserved(model):
        model(torch.full((3,), 5.0)).sum().backward()
    assert model.scale.grad is grad
    assert grad.tolist() == [1.0, 1.0, 1.0]
