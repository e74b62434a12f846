"""Task: what a fine-tuning config becomes. Two drivers train it: Lightning's Trainer and an Accelerate loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = dict[str, Tensor]
Say = Callable[[object], None]
Totals = dict[str, tuple[float, float]]
"""Name -> sum over what was measured, and its weight: the number of tokens, rows or whatever it is a mean over."""


def rows_of(batch: Batch) -> int:
    """First dimension of the batch's tensors."""
    return len(next(iter(batch.values())))


def means(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Each sum over its weight; what has no weight is left out."""
    return {name: total / weight for name, (total, weight) in totals.items() if weight}


@dataclass(slots=True, kw_only=True)
class Task:
    """Model, data and what is computed on them.

    Attributes:
        model: On the CPU, in float32 or as it came; only parameters that require gradients are trained.
        train: Rows with a length.
        held_out: Rows with a length, none of them in ``train``.
        collate: Rows to a batch of tensors.
        loss: Of the model on a batch, a scalar with gradients.
        metrics: Of the model on a held-out batch, without gradients. "loss" among them is the held-out loss;
            where it is absent, ``loss`` is called, weighted by the rows.
        processor: Tokenizer or image processor, exported beside the model.
        export: Writes a folder that plain transformers (or peft) loads: ``export(model, folder)``.
        unit: What ``count`` counts, for the report: "tokens" or "samples".
        count: Of a batch.
        conclude: Sums over all held-out batches to the figures that are reported.
    """

    model: nn.Module
    train: Dataset[Any]
    held_out: Dataset[Any]
    collate: Callable[[list[Any]], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    metrics: Callable[[nn.Module, Batch], Totals]
    processor: Any
    export: Callable[[nn.Module, Path], None]
    unit: str = "samples"
    count: Callable[[Batch], int] = rows_of
    conclude: Callable[[Mapping[str, tuple[float, float]]], dict[str, float]] = means
