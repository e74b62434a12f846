import pytest
import torch
from torch import nn

from kpt_lightning.errors import KptError
from kpt_lightning.recipes.registry import default_config
from kpt_lightning.recipes.task import means
from kpt_lightning.recipes.training import add, check_losses, make_optimizer, make_schedule, order


def test_each_epoch_has_every_row_once_in_another_order() -> None:
    chosen = order(5, 13, seed=0)
    epochs = chosen[:5], chosen[5:10], chosen[10:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(5))
    assert epochs[0] != epochs[1]
    assert len(set(epochs[2])) == 3
    assert order(5, 13, seed=0) == chosen
    assert order(5, 13, seed=1) != chosen


def test_rate_rises_and_falls_linearly() -> None:
    config = default_config("causal-lm-full", steps=6, warmup_steps=2, learning_rate=1.0)
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    schedule = make_schedule(optimizer, config)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_only_matrices_decay_and_frozen_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2).requires_grad_(False))
    groups = make_optimizer(model, default_config("causal-lm-full", weight_decay=0.5)).param_groups
    assert {group["weight_decay"]: len(group["params"]) for group in groups} == {0.5: 1, 0.0: 3}


def test_a_model_without_a_trainable_weight_is_refused() -> None:
    with pytest.raises(KptError, match="no parameter that requires a gradient"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), default_config("causal-lm-full"))


def test_means_are_over_all_batches_together() -> None:
    totals = add({"loss": (6.0, 3.0)}, {"loss": (2.0, 1.0), "seen": (1.0, 0.0)})
    assert means(totals) == {"loss": 2.0}


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_no_number_names_its_step(bad: str) -> None:
    losses = [torch.tensor(1.0), torch.tensor(float(bad)), torch.tensor(float("nan"))]
    with pytest.raises(KptError, match=rf"the loss of step 9 is {bad}: training has diverged.*Lower the learning rate"):
        check_losses(losses, last_step=10)
    check_losses(losses[:1], last_step=8)
