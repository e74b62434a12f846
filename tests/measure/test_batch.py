from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from transformers import BatchEncoding

from kpt_lightning.measure.batch import batch_size

IDS = torch.zeros(4, 16, dtype=torch.long)
MASK = torch.ones(4, 16)
Pair = namedtuple("Pair", ["labels", "input_ids"])


@dataclass
class Batch:
    label: torch.Tensor
    input_ids: torch.Tensor


@pytest.mark.parametrize(
    "batch",
    [
        {"attention_mask": MASK, "input_ids": IDS},
        {"labels": torch.zeros(4, 99, dtype=torch.long), "inner": {"input_ids": IDS}},
        BatchEncoding({"input_ids": IDS, "attention_mask": MASK}),
        Pair(torch.zeros(4, 3, dtype=torch.long), IDS),
        Batch(torch.zeros(4), IDS),
        (IDS, torch.zeros(4, dtype=torch.long)),
        [[torch.rand(4, 3, 8, 8)], IDS],
        IDS,
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_token_ids_are_found_in_any_nest(batch):
    size = batch_size(batch)
    assert (size.tokens, size.samples, size.shape) == (64, 4, (4, 16))


@pytest.mark.parametrize("batch", [(torch.rand(8, 3, 4, 4), torch.zeros(8, dtype=torch.long)), {"x": torch.rand(8, 5)}])
def test_a_batch_without_token_ids_counts_samples(batch):
    size = batch_size(batch)
    assert (size.tokens, size.samples) == (None, 8)


@pytest.mark.parametrize("batch", [None, "text", {}, (), 3, torch.tensor(1.0)])
def test_a_batch_without_tensors_counts_nothing(batch):
    assert batch_size(batch) is None


def test_a_batch_that_holds_itself_ends():
    loop = []
    loop.append(loop)
    assert batch_size(loop) is None
