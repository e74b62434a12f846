"""A run of any length fits into 128 blocks."""

import numpy as np
import pytest

from kpt_lightning.tracking.blocks import CAPACITY, MOST_STEPS, STEPS, Block, Blocks


def filled(count):
    blocks = Blocks()
    for number in range(count):
        blocks.add(Block(number * STEPS, float(number), np.nan, 1.0, 1e9, np.nan if number % 2 else 1980.0))
    return blocks


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 500, 2048, 5000, 20_000])
def test_a_run_of_any_length_keeps_at_most_128_blocks_in_order(count):
    blocks = filled(count)
    assert len(blocks) < CAPACITY or blocks.steps == MOST_STEPS
    assert len(blocks) <= CAPACITY
    first = blocks.column("first_step")
    assert (np.diff(first) > 0).all()
    assert count == 0 or first[0] == 0


def test_merged_blocks_hold_the_mean_of_what_was_read():
    blocks = filled(CAPACITY)
    assert blocks.steps == 2 * STEPS
    assert blocks.column("step_time")[:2].tolist() == [0.5, 2.5]
    assert blocks.column("clock").tolist() == [1980.0] * 64
    assert np.isnan(blocks.column("data_wait")).all()


def test_a_very_long_run_keeps_its_beginning_and_its_newest_steps():
    first = filled(20_000).column("first_step")
    assert np.diff(first[: CAPACITY // 2]).max() == MOST_STEPS
    assert first[-1] >= 20_000 * STEPS - 2 * MOST_STEPS
