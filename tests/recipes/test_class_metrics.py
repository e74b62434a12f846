from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kpt_lightning.recipes import class_metrics
from kpt_lightning.recipes.training import add

CLASSES = 5


class Answers(nn.Module):
    """A classifier whose logits are its input."""

    def forward(self, logits: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)


def figures(logits: Tensor, labels: Tensor, batch_size: int) -> dict[str, float]:
    totals: dict[str, tuple[float, float]] = {}
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        totals = add(totals, class_metrics.metrics(Answers(), {"logits": logits[part], "labels": labels[part]}))
    return class_metrics.conclude(totals)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("classes_seen", [2, CLASSES])
def test_figures_over_batches_are_those_of_scikit_learn_over_all_rows(batch_size: int, classes_seen: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes_seen, (64,), generator=generator)
    logits = torch.randn(64, CLASSES, generator=generator) + 2 * functional.one_hot(labels, CLASSES)
    logits[:, classes_seen:] = -9.0  # classes that never occur do not count
    predicted = logits.argmax(-1)
    expected = {
        "loss": float(functional.cross_entropy(logits, labels)),
        "accuracy": metrics.accuracy_score(labels, predicted),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
    }
    assert figures(logits, labels, batch_size) == pytest.approx(expected, rel=1e-5)


def test_one_class_for_every_row_has_a_low_macro_f1() -> None:
    labels = torch.tensor([0] * 9 + [1])
    result = figures(torch.tensor([[1.0, 0.0]]).repeat(10, 1), labels, 4)
    assert result["accuracy"] == 0.9
    assert result["macro_f1"] == pytest.approx((2 * 9 / (2 * 9 + 1)) / 2)
