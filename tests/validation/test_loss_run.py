"""A short run tells a change that trains worse, and leaves the weights as they were."""

from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpt_lightning.validation.loss_run import (
    SEEDS,
    STEPS,
    OutOfTimeError,
    judge_losses,
    losses_after,
    preserved_weights,
    room_for_weights,
)

NAN = float("nan")


Step = Callable[[int, int], Tensor]


def made() -> tuple[nn.Module, Step]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.BatchNorm1d(32), nn.Dropout(0.1), nn.Linear(32, 4))
    x = torch.randn(64, 16)
    y = (x[:, :4] + x[:, 4:8]).argmax(1)

    def step(seed: int, number: int) -> Tensor:
        # Rows are drawn for each step, and the last loss is that of all rows, as in a search.
        drawn = torch.randint(0, 64, (32,), generator=torch.Generator().manual_seed(100 * seed + number))
        rows = torch.arange(64) if number == STEPS else drawn
        return F.cross_entropy(model(x[rows]), y[rows])

    return model, step


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: each.detach().numpy().tobytes() for name, each in model.state_dict().items()}


def start_of(step: Step) -> float:
    return float(step(0, STEPS).detach())


def test_it_trains_and_leaves_no_trace() -> None:
    model, step = made()
    model[0].weight.grad = grad = torch.ones(32, 16)
    model[0].bias.requires_grad_(False)
    before, state = bits(model), torch.get_rng_state()
    start = start_of(step)
    torch.set_rng_state(state)
    # The look at the start has moved the statistics of the batch norm.
    before = bits(model)
    found = losses_after(model, step)
    assert len(found) == len(SEEDS)
    assert all(each < start - 0.05 for each in found)
    assert bits(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].weight.grad is grad
    assert grad.eq(1).all()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_weights_are_put_back_after_an_error_in_the_middle(error: type[BaseException]) -> None:
    model, step = made()
    before = bits(model)

    def fails(seed: int, number: int) -> Tensor:
        if number == 3:
            assert bits(model) != before
            raise error
        return step(seed, number)

    with pytest.raises(error):
        losses_after(model, fails)
    assert bits(model) == before


def test_each_seed_starts_from_the_same_weights_and_gives_the_same_again() -> None:
    model, step = made()
    first = losses_after(model, step)
    assert losses_after(model, step) == first
    assert losses_after(model, step, seeds=[1]) == first[1:2]
    assert len(set(first)) == len(SEEDS)


def test_no_step_begins_after_the_deadline_and_weights_are_put_back() -> None:
    model, step = made()
    before, calls = bits(model), []

    def counted(seed: int, number: int) -> Tensor:
        calls.append(number)
        return step(seed, number)

    with pytest.raises(OutOfTimeError, match="max_seconds"):
        losses_after(model, counted, deadline=0.0)
    assert not calls
    assert bits(model) == before


def test_the_loss_is_read_after_that_many_steps() -> None:
    model, step = made()
    numbers = []

    def counted(seed: int, number: int) -> Tensor:
        numbers.append((seed, number))
        return step(seed, number)

    losses_after(model, counted, seeds=[4, 5], steps=2)
    assert numbers == [(4, 0), (4, 1), (4, 2), (5, 0), (5, 1), (5, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_weights_of_any_dtype_come_back_and_frozen_ones_are_not_copied(dtype: torch.dtype) -> None:
    model = nn.ParameterDict({"a": nn.Parameter(torch.randn(5).to(dtype)), "b": nn.Parameter(torch.ones(3))})
    model["b"].requires_grad_(False)
    before = model["a"].detach().clone()
    with preserved_weights(model.parameters()):
        model["a"].data.mul_(3)
        model["b"].data.mul_(3)
    assert torch.equal(model["a"], before)
    assert model["b"].tolist() == [3.0, 3.0, 3.0]
    assert model["a"]._version == before._version


def test_sparse_and_complex_gradients_train_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.wave = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2, dtype=torch.complex64))

        def forward(self) -> Tensor:
            out = self.table(torch.tensor([1, 1, 2])) * self.wave
            return out.abs().square().sum()

    model = Model()
    before = [each.detach().clone() for each in model.parameters()]
    with torch.no_grad():
        start = float(model())
    (after,) = losses_after(model, lambda seed, number: model(), seeds=[0])
    assert after < start
    assert all(torch.equal(each, copy) for each, copy in zip(model.parameters(), before, strict=True))


def flipped(loss: Tensor) -> Tensor:
    return 2 * loss.detach() - loss


def noisy(loss: Tensor) -> Tensor:
    return loss * (1 + 1e-3 * torch.rand(()))


def blown(loss: Tensor) -> Tensor:
    return loss * NAN


@pytest.mark.parametrize(
    ("change", "kept"), [(lambda loss: loss, True), (noisy, True), (flipped, False), (blown, False)]
)
def test_a_change_that_trains_worse_is_rejected(change: Callable[[Tensor], Tensor], kept: bool) -> None:
    model, step = made()
    start = start_of(step)
    verdict = judge_losses(
        losses_after(model, step), losses_after(model, lambda seed, number: change(step(seed, number))), start, 2.0
    )
    assert bool(verdict) is kept, verdict.reason


def test_one_layer_that_learns_the_wrong_way_is_rejected() -> None:
    model, step = made()
    start = start_of(step)
    plain = losses_after(model, step)

    handle = model[4].weight.register_hook(lambda grad: -grad)
    worse = losses_after(model, step)
    handle.remove()
    verdict = judge_losses(plain, worse, start, 2.0)
    assert not verdict, verdict.reason


@pytest.mark.parametrize(
    ("plain", "changed", "start", "kept"),
    [
        # Two spreads are 0.2, and the loss falls by 1.
        ([1.0, 1.05, 1.1], [1.0, 1.05, 1.1], 2.05, True),
        ([1.0, 1.05, 1.1], [1.19, 1.24, 1.29], 2.05, True),
        ([1.0, 1.05, 1.1], [1.21, 1.26, 1.31], 2.05, False),
        ([1.0, 1.05, 1.1], [0.1, 0.1, 0.1], 2.05, True),
        # Repeats that agree: a tenth of what was learned is nothing.
        ([1.0, 1.0, 1.0], [1.09, 1.09, 1.09], 2.0, True),
        ([1.0, 1.0, 1.0], [1.11, 1.11, 1.11], 2.0, False),
        # Repeats far apart: a quarter of it is not.
        ([0.5, 1.0, 1.5], [1.24, 1.24, 1.24], 2.0, True),
        ([0.5, 1.0, 1.5], [1.26, 1.26, 1.26], 2.0, False),
        ([1.0, 1.1, 1.2], [1.0, NAN, 1.2], 2.0, False),
        ([NAN, NAN, NAN], [NAN, NAN, NAN], 2.0, False),
    ],
)
def test_the_limit_is_two_spreads_of_the_unchanged_models_repeats(
    plain: list[float], changed: list[float], start: float, kept: bool
) -> None:
    verdict = judge_losses(plain, changed, start, 2.0)
    assert bool(verdict) is kept, verdict.reason
    assert f"after {STEPS} steps" in verdict.reason


@pytest.mark.parametrize(("free", "fits"), [(10_000, True), (400, False)])
def test_room_is_asked_for_before_weights_are_copied(monkeypatch: pytest.MonkeyPatch, free: int, fits: bool) -> None:
    # What the machine has free is not the thing under test.
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    model = nn.Linear(10, 10)
    assert bool(room_for_weights(model.parameters())) is fits
    assert room_for_weights(model.requires_grad_(False).parameters())
