"""Awkward models and how they are trained; for the tests of bad input."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kpt_lightning import KptStrategy

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "max_epochs": 1, "devices": 1,
}  # fmt: skip


EMULATED = {"float8": {"emulate": True, "only_where_it_pays": False}}


FP8 = {"config": EMULATED, "precision": "fp8"}


class Net(LightningModule):
    """Base of the models here; ``loss`` is what each defines."""

    def __init__(self) -> None:
        super().__init__()
        self.build()
        self.losses: list[float] = []
        self.kinds: set[str] = set()

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch).square().mean()

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.kinds |= {type(module).__name__ for module in self.modules() if isinstance(module, nn.Linear)}
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)


def batches(count: int = 4) -> list[Tensor]:
    """The same batch again and again: its loss must fall."""
    return [torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) for _ in range(count)]


def fit(module: LightningModule, data: Any, **strategy: Any) -> Trainer:
    trainer = Trainer(strategy=KptStrategy(**(strategy or FP8)), **QUIET)
    trainer.fit(module, DataLoader(data, batch_size=None))
    return trainer


class Tied(Net):
    def build(self) -> None:
        self.embed, self.mix, self.readout = nn.Embedding(32, 32), nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.readout.weight = self.embed.weight

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.readout(self.mix(self.embed(batch))).flatten(0, 1), batch.flatten())


class Shared(Net):
    def build(self) -> None:
        self.first = nn.Linear(32, 32)
        self.second = self.first
        self.third = nn.Linear(32, 32)
        self.third.weight = self.first.weight

    def loss(self, batch: Any) -> Tensor:
        return self.third(self.second(self.first(batch))).square().mean()


class Frozen(Net):
    def build(self) -> None:
        super().build()
        self.net[0].requires_grad_(False)


class ZeroSize(Net):
    def build(self) -> None:
        super().build()
        self.nothing = nn.Parameter(torch.zeros(0))
        self.empty = nn.Linear(32, 0)


class Late(Net):
    def build(self) -> None:
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            Net.build(self)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        loss = super().training_step(batch, index)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Blocks(Net):
    def build(self) -> None:
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2))

    def loss(self, batch: Any) -> Tensor:
        for layer in self.layers:
            batch = layer(batch)
        return batch.square().mean()
