"""Packed rows are told by their positions."""

from typing import Any

import pytest
import torch

from kpt_lightning.attention.packed import packed_lengths, packing_advice


def row(*lengths: int) -> list[int]:
    return [position for length in lengths for position in range(length)]


@pytest.mark.parametrize("lengths", [[[8]], [[3, 5], [8]], [[1, 1, 6], [2, 2, 4]]])
def test_lengths_are_read_off_positions_that_start_again(lengths: list[list[int]]) -> None:
    batch = {"position_ids": torch.tensor([row(*each) for each in lengths])}
    assert packed_lengths(batch) == (lengths if any(len(each) > 1 for each in lengths) else None)


@pytest.mark.parametrize(
    "batch", [None, torch.ones(2, 3), (torch.arange(4),), {}, {"position_ids": torch.rand(2, 4)}, {"position_ids": 3}]
)
def test_anything_else_is_not_packed(batch: Any) -> None:
    assert packed_lengths(batch) is None
    assert packing_advice(batch) is None


def test_the_advice_counts_what_a_mask_tensor_wastes() -> None:
    text = packing_advice({"position_ids": torch.tensor([row(4, 4)])})
    # 64 pairs for 2 * 10.
    assert text is not None
    assert "2 sequences are packed into 1 rows" in text
    assert "3.2x the useful FLOPs" in text
