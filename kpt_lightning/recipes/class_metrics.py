"""Held-out figures of a classifier: loss, accuracy and macro F1, as sums that add up over batches and processes."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpt_lightning.recipes.task import Batch, Totals, means

F1 = "f1/"
"""What the name of a class's own F1 starts with, before the number of the class."""


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the batch's labels, in nats, a scalar."""
    value = model(**batch).loss
    assert isinstance(value, Tensor)
    return value


def metrics(model: nn.Module, batch: Batch) -> Totals:
    """Sums over the rows of a batch, with one entry for each class, whether it occurs or not.

    Args:
        model: Answers with ``.logits`` of shape ``(rows, classes)``.
        batch: With ``labels``, int64, shape ``(rows,)``.
    """
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
    predicted = logits.argmax(-1)
    total = float(functional.cross_entropy(logits, labels, reduction="sum"))
    rows, right = float(len(labels)), predicted == labels
    totals: Totals = {"loss": (total, rows), "accuracy": (float(right.sum()), rows)}
    count = partial(torch.bincount, minlength=logits.shape[-1])
    # F1 is 2 TP / (2 TP + FP + FN), a ratio of sums; the rows of a class are TP + FN, its predictions TP + FP.
    hits, seen = (2 * count(labels[right])).tolist(), (count(labels) + count(predicted)).tolist()
    for number, (hit, weight) in enumerate(zip(hits, seen, strict=True)):
        totals[f"{F1}{number}"] = (float(hit), float(weight))
    return totals


def conclude(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Loss, accuracy, and the mean of the F1 of each class that is a label or a prediction of some row."""
    figures = means(totals)
    of_classes = [value for name, value in figures.items() if name.startswith(F1)]
    result = {name: value for name, value in figures.items() if not name.startswith(F1)}
    return {**result, "macro_f1": sum(of_classes) / len(of_classes)} if of_classes else result
