"""Buffers and weights under ``preserved``: put back in place, or a write to a weight is found out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.errors import KptError
from kpt_lightning.validation.state import preserved
from tests.validation.stateful import HasState


def test_batch_norm_statistics_are_put_back_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    norm: Any = model[1]
    mean, count = norm.running_mean, norm.num_batches_tracked
    with preserved(model):
        model(torch.randn(2, 3, 8, 8))
        assert norm.running_mean.any()
        assert count == 1
    assert norm.running_mean is mean
    assert norm.num_batches_tracked is count
    assert not mean.any()
    assert count == 0


class Changes(nn.Module):
    """A buffer that a forward pass changes in a way of the test's."""

    def __init__(self, buffer: Tensor, change: Callable[["Changes"], None]) -> None:
        super().__init__()
        self.register_buffer("buffer", buffer)
        self.change = change

    def forward(self) -> None:
        self.change(self)


def _resize(module: Any) -> None:
    module.buffer.data = torch.ones(7)


def _halve(module: Any) -> None:
    module.buffer.data = module.buffer.data.half()


def _fill(module: Any) -> None:
    module.buffer.fill_(5)


def _fill_past_the_version(module: Any) -> None:
    module.buffer.data.fill_(5)


def _rebind(module: Any) -> None:
    module.buffer = module.buffer + 1


def _drop(module: Any) -> None:
    del module.buffer


@pytest.mark.parametrize("change", [_resize, _halve, _fill, _fill_past_the_version, _rebind, _drop])
@pytest.mark.parametrize("buffer", [torch.arange(3.0), torch.tensor([1.0, float("nan")]), torch.eye(3)[:, 1]])
def test_a_buffer_comes_back_however_it_was_changed(buffer: Tensor, change: Callable[[Any], None]) -> None:
    model = Changes(buffer.clone(), change)
    object_before, content = model.buffer, model.buffer.clone()
    with preserved(model):
        model()
    assert model.buffer is object_before
    assert model.buffer.dtype == content.dtype
    assert torch.equal(model.buffer.nan_to_num(), content.nan_to_num())


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(1).expand(4, 4),
        torch.arange(3.0).expand(2, 3),
        torch.eye(3).to_sparse(),
        torch.empty(0),
        torch.tensor(1 + 2j),
        torch.zeros(3, device="meta"),
        torch.arange(6.0).unfold(0, 3, 1),
    ],
    ids=["expanded", "expanded in part", "sparse", "empty", "complex", "meta", "overlapping"],
)
def test_unusual_buffers_that_stay_as_they_are_are_no_obstacle(buffer: Tensor) -> None:
    model = Changes(buffer, lambda module: None)
    with preserved(model):
        model()
    assert model.buffer is buffer


def test_a_sparse_buffer_is_put_back() -> None:
    def change(module: Any) -> None:
        module.buffer.mul_(3)

    model = Changes(torch.eye(3).to_sparse(), change)
    with preserved(model):
        model()
        assert model.buffer.to_dense()[0, 0] == 3
    assert torch.equal(model.buffer.to_dense(), torch.eye(3))


def test_a_cache_made_in_inference_mode_is_no_obstacle() -> None:
    with torch.inference_mode():
        made = torch.ones(3)
    model = Changes(made, lambda module: None)
    model.attribute = made  # type: ignore[assignment]
    with preserved(model):
        model()
    assert model.attribute is made


def test_what_did_not_change_is_not_written_so_a_graph_of_the_users_stays_valid() -> None:
    model = HasState()
    assert isinstance(model.bank, Tensor)
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * model.bank).sum()
    version = model.bank._version
    with preserved(model):
        pass
    assert model.bank._version == version
    loss.backward()
    assert weight.grad is not None


def test_a_model_that_writes_to_its_own_parameter_is_found_out() -> None:
    class Clips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.linear.weight.clamp_(-0.1, 0.1)
            return self.linear(x)  # type: ignore[no-any-return]

    model = Clips()
    with pytest.raises(KptError, match=r"writes to its own parameter 'linear.weight'.*plan by rules"), preserved(model):
        model(torch.ones(1, 2))
    with preserved(model, weights=False):
        model(torch.ones(1, 2))


def test_an_encoder_that_follows_another_by_its_data_is_found_out() -> None:
    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for mine, other in zip(self.key.parameters(), self.query.parameters(), strict=True):
                mine.data = 0.9 * mine.data + 0.1 * other.data
            return self.key(x) - self.query(x)  # type: ignore[no-any-return]

    model = Momentum()
    with pytest.raises(KptError, match=r"own parameter 'key\.(weight|bias)'"), preserved(model):
        model(torch.ones(1, 4))
    with preserved(model, weights=False):
        model(torch.ones(1, 4))


def test_an_optimizer_step_from_a_hook_of_backward_is_found_out() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(KptError, match="its own parameter"), preserved(model):
        model(torch.ones(1, 2)).sum().backward()


def test_an_error_of_the_model_is_not_hidden_by_the_check_of_its_weights() -> None:
    model = nn.Linear(2, 2)

    def fail() -> None:
        with preserved(model), torch.no_grad():
            model.weight.zero_()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
