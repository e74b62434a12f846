"""The README's example on a tiny model, any machine, seconds. Run: python examples/lightning_quickstart.py.

``--epochs 1`` trains less.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kpt_lightning import AutoOptimizeCallback, KptStrategy, RegressionCallback


class Classifier(LightningModule):
    """An ordinary LightningModule: nothing in it knows of kpt_lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch: inputs (batch, 64), labels (batch,)."""
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.layers(inputs), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def blobs(count: int) -> TensorDataset:
    """Eight clouds of points: inputs (count, 64) float32, labels (count,) int64."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(8, (count,), generator=generator)
    centers = 0.4 * torch.randn(8, 64, generator=generator)
    return TensorDataset(centers[labels] + torch.randn(count, 64, generator=generator), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    epochs = parser.parse_args().epochs

    trainer = Trainer(
        strategy=KptStrategy(),
        callbacks=[AutoOptimizeCallback(), RegressionCallback()],
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), DataLoader(blobs(4096), batch_size=64, shuffle=True))
    print(f"Loss after training: {float(trainer.callback_metrics['loss']):.4f}")


if __name__ == "__main__":
    main()
