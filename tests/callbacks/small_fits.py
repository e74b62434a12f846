"""Small modules and data for fits of a fraction of a second."""

import time

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from kpt_lightning.callbacks import RegressionCallback


class Rows(Dataset):
    def __init__(self, count, delay=0.0):
        self.count, self.delay = count, delay

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        time.sleep(self.delay)
        return torch.full((8,), float(index % 3))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.ones(8) for _ in range(40))


class Net(pl.LightningModule):
    def __init__(self, *, step_seconds=0.0, fail_at=None, error=None, nan_at=None, slow_from=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.step_seconds, self.fail_at, self.error, self.nan_at = step_seconds, fail_at, error, nan_at
        self.slow_from = slow_from

    def training_step(self, batch, batch_idx):
        if self.fail_at is not None and self.global_step >= self.fail_at:
            raise self.error or RuntimeError("boom")
        time.sleep(self.step_seconds if self.slow_from is None or self.global_step < self.slow_from else 0.01)
        loss = self.layers(batch).square().mean()
        return loss * float("nan") if self.nan_at == self.global_step else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        time.sleep(0.02)


class Manual(Net):
    """Two optimizers; with ``every`` they step on some batches only."""

    def __init__(self, every=1):
        super().__init__()
        self.automatic_optimization, self.every = False, every

    def training_step(self, batch, batch_idx):
        loss = self.layers(batch).square().mean()
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        return {"loss": loss}

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=1e-3) for layer in (self.layers[0], self.layers[2])]


def callback_for(tmp_path, **options):
    return RegressionCallback(tmp_path / "runs.sqlite", print_report=False, **options)
