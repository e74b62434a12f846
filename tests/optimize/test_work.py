"""Rows drawn again from a batch, alike in every tensor that has them."""

from collections import namedtuple
from typing import Any

import pytest
import torch

from kpt_lightning.optimize.work import Work, resample, resampled
from kpt_lightning.validation.workload import Workload

Pair = namedtuple("Pair", ["x", "y"])


def test_rows_stay_together_across_tensors() -> None:
    batch = {"x": torch.arange(6.0)[:, None].expand(6, 3), "more": (torch.arange(6), [torch.arange(6) * 2])}
    found = resample(batch, 3)
    rows = found["more"][0]
    assert torch.equal(found["x"][:, 0].long(), rows)
    assert torch.equal(found["more"][1][0], rows * 2)
    assert len(set(rows.tolist())) < 6
    assert set(rows.tolist()) <= set(range(6))


def test_a_seed_draws_the_same_rows_and_another_others() -> None:
    batch = torch.arange(32)
    assert torch.equal(resample(batch, 1), resample(batch, 1))
    assert not torch.equal(resample(batch, 1), resample(batch, 2))


def test_the_random_state_is_not_touched() -> None:
    before = torch.get_rng_state()
    resample(torch.arange(8), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch", [torch.arange(1)[None], "text", None, {"n": 3}, torch.tensor(3.0), torch.empty(0, 2)])
def test_a_batch_without_rows_to_draw_from_stays(batch: Any) -> None:
    assert resample(batch, 1) is batch


def test_what_has_no_such_rows_stays_as_it_is() -> None:
    mask, scalar = torch.ones(3, 3), torch.tensor(2.0)
    found = resample(Pair(torch.arange(8), {"mask": mask, "scalar": scalar, "text": "a", "none": None}), 1)
    assert type(found) is Pair
    assert found.y["mask"] is mask
    assert found.y["scalar"] is scalar
    assert (found.y["text"], found.y["none"]) == ("a", None)


def test_a_sparse_tensor_does_not_stop_it() -> None:
    batch = (torch.arange(4), torch.eye(4).to_sparse())
    found = resample(batch, 1)
    assert torch.equal(found[1].to_dense(), torch.eye(4)[found[0]])


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_batch_is_put_back(error: type[BaseException] | None) -> None:
    batch = (torch.randn(8, 4), torch.randn(8, 4))
    work: Work = Workload(torch.nn.Linear(4, 4), batch, torch.nn.MSELoss())
    plain = work.loss().detach()
    try:
        with resampled(work, 1):
            assert not torch.equal(work.loss().detach(), plain)
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert work.batch is batch
    assert torch.equal(work.loss().detach(), plain)
