"""Six models that train on two CPU cores in tens to hundreds of milliseconds a step, each with one batch."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model in train mode, one batch, and how its loss comes out, as ``auto_optimize`` takes them.

    Attributes:
        title: What it is, for a table.
        model: In float32 on the CPU.
        batch: One batch.
        loss_fn: None where the model gives the loss.
    """

    title: str
    model: nn.Module
    batch: Any
    loss_fn: Callable[..., Tensor] | None = None


def build(name: str) -> Case:
    """The case of that name in ``MODELS``, the same at each call.

    Raises:
        MissingDependencyError: SmolLM2 is asked for and its package, transformers or gguf is absent.
    """
    torch.manual_seed(0)
    return MODELS[name]()


def smollm2() -> Case:
    from kpt_lightning.recipes.smollm2 import load_model

    model = load_model().train()
    return Case(title="SmolLM2-135M, 1 x 32 tokens", model=model, batch=_text(model.config.vocab_size, 1, 32, True))


def bert() -> Case:
    """https://huggingface.co/google/bert_uncased_L-4_H-512_A-8/blob/main/config.json"""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048, num_labels=2
    )
    model = BertForSequenceClassification(config).train()
    batch = _text(config.vocab_size, 4, 64, False) | {"labels": torch.randint(0, 2, (4,))}
    return Case(title="BERT-small (4 layers, 512 wide), 4 x 64 tokens", model=model, batch=batch)


def vit() -> Case:
    """https://huggingface.co/facebook/deit-tiny-patch16-224/blob/main/config.json"""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=1000
    )
    batch = {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.randint(0, 1000, (2,))}
    model = ViTForImageClassification(config).train()
    return Case(title="ViT-tiny (12 layers, 192 wide), 2 images of 224 x 224", model=model, batch=batch)


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=384, n_layer=6, n_head=6, n_positions=512)
    model = GPT2LMHeadModel(config).train()
    return Case(title="GPT-2 (6 layers, 384 wide), 2 x 64 tokens", model=model, batch=_text(50257, 2, 64, True))


def mlp() -> Case:
    widths = (784, 2048, 2048, 2048)
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    batch = torch.randn(128, widths[0]), torch.randint(0, 10, (128,))
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
    return Case(title="MLP (3 layers of 2048), 128 rows", model=model, batch=batch, loss_fn=nn.CrossEntropyLoss())


def convnet() -> Case:
    """ResNet-20 for 32 x 32 pixels: He et al. 2015, section 4.2, https://arxiv.org/abs/1512.03385"""
    stages = [Residual(before, after, stride) for before, after, stride in _RESNET_20]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    model = nn.Sequential(*_convolution(3, 16, 1), nn.ReLU(), *stages, *head)
    batch = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    title = "ConvNet (ResNet-20), 32 images of 32 x 32"
    return Case(title=title, model=model, batch=batch, loss_fn=nn.CrossEntropyLoss())


MODELS: dict[str, Callable[[], Case]] = {
    "smollm2": smollm2, "bert": bert, "vit": vit, "gpt2": gpt2, "mlp": mlp, "convnet": convnet,
}  # fmt: skip

_RESNET_20 = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(before, after, stride), nn.ReLU(inplace=True), *_convolution(after, after, 1)
        )
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.body(images) + self.shortcut(images))


def _convolution(before: int, after: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)]


def _text(vocab_size: int, rows: int, length: int, labels: bool) -> dict[str, Tensor]:
    """Random tokens as a tokenizer gives them, with a mask that hides nothing."""
    ids = torch.randint(0, vocab_size, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | {"labels": ids} if labels else batch
