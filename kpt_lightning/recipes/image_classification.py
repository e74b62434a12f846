"""Image classification: a vision transformer reads handwritten digits, from random weights or pretrained."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import TRANSFORMERS
from kpt_lightning.recipes import class_metrics, digits, export, image_preparation, minilm
from kpt_lightning.recipes.config import FineTuneConfig
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.image_preparation import ImagePreparation
from kpt_lightning.recipes.task import Batch, Say, Task
from kpt_lightning.recipes.unused_settings import refuse_unused

NEW_MODEL = "vit-tiny"
PATCH = 4
"""Rows and columns of a patch: four patches and the class token are five tokens for an image of 8 x 8."""


def make_task(config: FineTuneConfig, say: Say = print) -> Task:
    """The model, and the digits prepared as it expects them.

    Args:
        config: Of the recipe image-classification.
        say: Receives a line before each step that takes seconds, and what the user should know.

    Raises:
        ConfigError: Model or data are not there or do not fit.
        MissingDependencyError: An optional package is absent.
    """
    share = _share(config)
    say(f"Loading {config.model} ...")
    model, prepare = _model(config.model, say)
    say("Reading the digits ...")
    train, held_out = (_prepared(part, prepare) for part in digits.split(digits.read_digits(), share))
    return Task(
        model=model, train=train, held_out=held_out, collate=collate, loss=class_metrics.loss,
        metrics=class_metrics.metrics, processor=prepare, export=partial(_export, prepare),
        conclude=class_metrics.conclude,
    )  # fmt: skip


def new_model() -> nn.Module:
    """A vision transformer of 71 thousand parameters for images of 8 x 8, with random weights.

    Raises:
        MissingDependencyError: Where transformers is absent.
    """
    TRANSFORMERS.require(f"model={NEW_MODEL!r}")
    from transformers import ViTConfig, ViTForImageClassification

    settings = ViTConfig(
        image_size=digits.SIZE, patch_size=PATCH, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, hidden_dropout_prob=0.0, **_labels(),
    )  # fmt: skip
    model: nn.Module = ViTForImageClassification(settings)
    return model


def collate(rows: list[tuple[Tensor, Tensor]]) -> Batch:
    """``pixel_values``, float32, shape ``(rows, 3, height, width)``, and ``labels``, int64, shape ``(rows,)``."""
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def _share(config: FineTuneConfig) -> float:
    data: DataConfig = config.data
    if data.source != "digits":
        raise ConfigError("data.source", data.source, f"{config.recipe!r} reads digits alone", "Set it to 'digits'")
    refuse_unused(config.recipe, data, ("source", "held_out"))
    if isinstance(data.held_out, str):
        raise ConfigError("data.held_out", data.held_out, "no images are read from there", "Give a share such as 0.2")
    return data.held_out


def _model(name: str, say: Say) -> tuple[nn.Module, ImagePreparation]:
    if name == NEW_MODEL:
        return new_model().train(), image_preparation.for_size(digits.SIZE)
    prepare = image_preparation.of_model(name)
    model, new = minilm.load_model(
        "AutoModelForImageClassification", name, num_labels=len(digits.LABELS), ignore_mismatched_sizes=True,
        **_labels(),
    )  # fmt: skip
    if new:
        say(f"New weights, random until trained: {', '.join(new)}")
    return model, prepare


def _labels() -> dict[str, Any]:
    numbers = dict(enumerate(digits.LABELS))
    return {"id2label": numbers, "label2id": {name: number for number, name in numbers.items()}}


def _prepared(part: digits.Digits, prepare: ImagePreparation) -> "Dataset[Any]":
    return cast("Dataset[Any]", TensorDataset(prepare(part.images), part.labels))


def _export(prepare: ImagePreparation, model: nn.Module, folder: Path) -> None:
    export.save(model, prepare, folder)
