"""What both drivers share: the order of the rows, optimizer, rates and the held-out figures."""

from collections.abc import Iterable, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset

from kpt_lightning.errors import ConfigError, KptError
from kpt_lightning.recipes.config import FineTuneConfig
from kpt_lightning.recipes.task import Batch, Task, Totals, rows_of

LAST_RATE = 0.1
"""Share of the peak rate that the last step ends at."""


def order(rows: int, wanted: int, seed: int) -> list[int]:
    """Which rows are trained on, one after the other: all in a random order, then all in another one, and so on.

    Args:
        rows: In the training data.
        wanted: In the run.
        seed: Of the orders.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-wanted // rows)
    shuffled = [torch.randperm(rows, generator=generator) for _ in range(epochs)]
    return cast(list[int], torch.cat(shuffled)[:wanted].tolist())


def train_loader(task: Task, config: FineTuneConfig, processes: int = 1) -> "DataLoader[Any]":
    """Every batch of the run, in order, for all processes together.

    Raises:
        ConfigError: The training data is empty.
    """
    rows = _rows(task.train, "train")
    wanted = config.steps * config.gradient_accumulation * config.batch_size * processes
    chosen = Subset(task.train, order(rows, wanted, config.seed))
    return DataLoader(chosen, batch_size=config.batch_size, collate_fn=task.collate)


def held_out_loader(task: Task, config: FineTuneConfig) -> "DataLoader[Any]":
    """The held-out rows that are measured, the first ones.

    Raises:
        ConfigError: There are none.
    """
    rows = _rows(task.held_out, "held-out")
    wanted = min(rows, config.held_out_batches * config.batch_size)
    return DataLoader(Subset(task.held_out, range(wanted)), batch_size=config.batch_size, collate_fn=task.collate)


def make_optimizer(model: nn.Module, config: FineTuneConfig) -> Optimizer:
    """AdamW over what is trainable; biases and norms do not decay.

    Raises:
        KptError: Nothing is trainable.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise KptError(f"{type(model).__name__} has no parameter that requires a gradient: nothing can be trained")
    groups = [
        {"params": [each for each in trainable if each.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [each for each in trainable if each.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)


def make_schedule(optimizer: Optimizer, config: FineTuneConfig) -> LambdaLR:
    """A linear rise over the warm-up, then a linear fall to a tenth of the peak."""

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / (config.warmup + 1)
        return max(LAST_RATE, 1 - (step - config.warmup) / (config.steps - config.warmup))

    return LambdaLR(optimizer, factor)


def measure(task: Task, model: nn.Module, batch: Batch) -> Totals:
    """The metrics of a held-out batch, the loss among them."""
    totals = dict(task.metrics(model, batch))
    if "loss" not in totals:
        rows = rows_of(batch)
        totals["loss"] = (float(task.loss(model, batch)) * rows, float(rows))
    return totals


def add(totals: Totals, more: Totals) -> Totals:
    """The sums and weights of both."""
    zero = (0.0, 0.0)
    names = totals.keys() | more.keys()
    both = {name: (totals.get(name, zero), more.get(name, zero)) for name in names}
    return {name: (one[0] + two[0], one[1] + two[1]) for name, (one, two) in both.items()}


def check_losses(losses: Iterable[Tensor], last_step: int) -> None:
    """Stop where the loss is no number any more.

    Args:
        losses: Of the latest steps, scalars.
        last_step: Number of the latest, from 1.

    Raises:
        KptError: One is NaN or infinite.
    """
    values = list(losses)
    finite = torch.isfinite(torch.stack(values)).tolist()
    if all(finite):
        return
    place = finite.index(False)
    step = last_step - len(values) + place + 1
    raise KptError(
        f"the loss of step {step} is {float(values[place])}: training has diverged and nothing was written. Lower the "
        "learning rate, train at precision bf16 or 32, or look for a bad row in the data"
    )


def _rows(data: Dataset[Any], part: str) -> int:
    rows = len(cast(Sized, data))
    if not rows:
        raise ConfigError("data", part, "this part of the data has no row", "Give more data or another held_out")
    return rows
