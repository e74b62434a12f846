"""A ViT and a BERT of the large shape in plain LightningModules, and their data. Knows nothing of kpt_lightning."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
# https://huggingface.co/google/vit-large-patch16-224/blob/main/config.json
# https://huggingface.co/google-bert/bert-large-uncased/blob/main/config.json
ENCODERS: dict[str, dict[str, Any]] = {
    "vit-l": dict(LARGE, image_size=224, patch_size=16, num_labels=1000),
    "bert-large": dict(LARGE, vocab_size=30522, max_position_embeddings=512),
    "vit-tiny": dict(SMALL, image_size=32, patch_size=16, num_labels=10),
    "bert-tiny": dict(SMALL, vocab_size=512, max_position_embeddings=64),
}


class Encoder(LightningModule):
    """What a user writes: a transformers model, its own loss, AdamW."""

    def __init__(self, shape: str, learning_rate: float) -> None:
        super().__init__()
        settings = ENCODERS[shape]
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            self.model: Any = (
                ViTForImageClassification(ViTConfig(**settings)) if shape.startswith("vit")
                else BertForMaskedLM(BertConfig(**settings, use_cache=False))
            )  # fmt: skip
        self.learning_rate = learning_rate

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated ones."""
        return max((each for each in self.modules() if isinstance(each, nn.ModuleList)), key=len)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        fused = torch.cuda.is_available()
        return torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0.1, fused=fused)


class Samples(Dataset[dict[str, Tensor]]):
    """As many random samples as are asked for, out of a few that are kept."""

    KEPT = 256

    def __init__(self, shape: str, length: int, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        settings = ENCODERS[shape]
        self.count = count
        if shape.startswith("vit"):
            size = settings["image_size"]
            self.inputs = {"pixel_values": torch.randn(self.KEPT, 3, size, size, generator=generator)}
            self.inputs["labels"] = torch.randint(settings["num_labels"], (self.KEPT,), generator=generator)
        else:
            ids = torch.randint(settings["vocab_size"], (self.KEPT, length), generator=generator)
            self.inputs = {"input_ids": ids, "labels": ids}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index % self.KEPT] for name, values in self.inputs.items()}


def sample_loader(shape: str, batch: int, length: int, steps: int) -> DataLoader[dict[str, Tensor]]:
    """Images, or ``length`` tokens each."""
    return DataLoader(Samples(shape, length, batch * steps), batch_size=batch, pin_memory=torch.cuda.is_available())
