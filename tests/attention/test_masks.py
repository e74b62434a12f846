"""A mask is called causal only where it hides the future, all of it, and nothing else."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kpt_lightning.attention.masks import causal_masks, is_causal_mask

SEEN = torch.ones(4, 6, 6, dtype=torch.bool).tril()


def additive(seen: Tensor, hidden: float) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, hidden)


@pytest.mark.parametrize("mask", [SEEN, *(additive(SEEN, each) for each in (-torch.inf, -1e4, -3.4e38))])
def test_a_causal_mask_is_told_in_either_form(mask: Tensor) -> None:
    assert is_causal_mask(mask)


@pytest.mark.parametrize("column", [0, 3, 5])
def test_padding_and_a_visible_future_are_no_causal_mask(column: int) -> None:
    padded, open_future = SEEN.clone(), SEEN.clone()
    padded[1, :, column] = False
    open_future[2, 0, max(column, 1)] = True
    for seen in (padded, open_future, torch.ones_like(SEEN)):
        assert not is_causal_mask(seen)
        assert not is_causal_mask(additive(seen, -torch.inf))


def test_a_bias_on_what_is_attended_is_no_causal_mask() -> None:
    biased = additive(SEEN, -torch.inf)
    biased[0, 5, 1] = 0.5
    assert not is_causal_mask(biased)


def test_masks_are_found_by_name_and_by_place_and_calls_without_one_are_left_out() -> None:
    q = torch.randn(1, 4, 6, 8)

    def run() -> None:
        scaled_dot_product_attention(q, q, q, SEEN)
        scaled_dot_product_attention(q, q, q, is_causal=True)
        scaled_dot_product_attention(q, q, q, attn_mask=~SEEN)

    assert causal_masks(run) == [True, False]
