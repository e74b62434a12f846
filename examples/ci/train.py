"""A small training whose speed a build watches, on any CPU. Run: python examples/ci/train.py --fits 3.

Each fit is one run in the history that KPT_HISTORY names, .kpt/runs.sqlite without it.
"""

import argparse
import os
import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kpt_lightning import RegressionCallback


class Classifier(LightningModule):
    """An ordinary LightningModule: nothing in it knows of kpt_lightning."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 8)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch: inputs (batch, 64), labels (batch,)."""
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.layers(inputs), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def blobs(count: int) -> TensorDataset:
    """Eight clouds of points: inputs (count, 64) float32, labels (count,) int64."""
    labels = torch.randint(8, (count,))
    centers = 0.4 * torch.randn(8, 64)
    return TensorDataset(centers[labels] + torch.randn(count, 64), labels)


def fit(steps: int) -> None:
    """One run, the same each time."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=[RegressionCallback(os.environ.get("KPT_HISTORY"), warmup_steps=5, name="ci-example")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(blobs(256 * steps), batch_size=256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", type=int, default=1, help="runs to add to the history")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each")
    parser.add_argument("--turn-over", metavar="TEXT", help="wait for a line before each fit, print this after it")
    asked = parser.parse_args()

    # A second thread would compete with whatever else the machine does, and its share is never the same twice.
    torch.set_num_threads(1)
    for _ in range(asked.fits):
        if asked.turn_over and not sys.stdin.readline():
            break
        fit(asked.steps)
        if asked.turn_over:
            print(asked.turn_over, flush=True)


if __name__ == "__main__":
    main()
