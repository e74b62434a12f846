import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from kpt_lightning.errors import KptError
from kpt_lightning.measure.loading import measure_loader, measure_workers, why_not_measurable

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Slow(Dataset[Tensor]):
    """Each sample waits, as for a disk."""

    def __init__(self, seconds: float = 0.004, length: int = 40) -> None:
        self.seconds, self.length = seconds, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        assert 0 <= index < self.length
        time.sleep(self.seconds)
        return torch.tensor([index])


class Counting(Slow):
    reads = 0

    def __getitem__(self, index: int) -> Tensor:
        self.reads += 1
        return super().__getitem__(index)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        raise AssertionError("consumed")


def test_waiting_is_told_from_computing() -> None:
    found = measure_loader(DataLoader(Slow(), batch_size=4, shuffle=True), 2)
    assert found.seconds >= 4 * 0.004
    assert found.busy < 0.5
    assert found.changes is None
    assert found.batch.shape == (4, 1)


def test_neither_sampler_nor_random_state_is_used_up() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(torch.arange(12)), batch_size=4, shuffle=True, generator=generator)
    states = random.getstate(), torch.get_rng_state(), generator.get_state()
    measure_loader(loader)
    measure_workers(loader, {"num_workers": 1}, 2)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert torch.equal(generator.get_state(), states[2])
    seen = torch.cat([batch for (batch,) in loader])
    assert sorted(seen.tolist()) == list(range(12))


def test_a_dataset_that_changes_while_read_is_noticed_in_a_wrapper_too() -> None:
    assert measure_loader(DataLoader(Counting())).changes == "reads"
    assert measure_loader(DataLoader(torch.utils.data.Subset(Counting(), range(9)))).changes == "dataset.reads"


@pytest.mark.parametrize("batching", [{"batch_size": 4}, {"batch_size": 100}, {"batch_size": None}], ids=str)
def test_any_batching_reads_only_samples_that_there_are(batching: dict[str, Any]) -> None:
    loader = DataLoader(Slow(0.0, 10), **batching)
    assert measure_loader(loader, 4).seconds > 0
    assert measure_workers(loader, {"num_workers": 1}, 4) > 0


def test_two_workers_wait_at_the_same_time() -> None:
    loader = DataLoader(Slow(0.02), batch_size=4)
    alone = measure_loader(loader, 2).seconds
    assert measure_workers(loader, {"num_workers": 2, "prefetch_factor": 2}, 6) < alone


def test_a_worker_that_raises_is_reported() -> None:
    loader = DataLoader(Slow(0.0), collate_fn=lambda samples: samples[0].no_such_method())
    with pytest.raises(AttributeError, match="no_such_method"):
        measure_workers(loader, {"num_workers": 1}, 2)


class OwnBatches(BatchSampler):
    pass


UNKNOWN = {
    "iterable": (lambda: DataLoader(Endless()), "gives each batch once"),
    "sampler": (lambda: DataLoader(Slow(), sampler=SubsetRandomSampler([1])), "SubsetRandomSampler"),
    "batches": (lambda: DataLoader(Slow(), batch_sampler=OwnBatches(range(4), 2, False)), "known to itself"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cannot_be_read_without_being_consumed_is_refused(case: str) -> None:
    make, why = UNKNOWN[case]
    assert why in (why_not_measurable(make()) or "")
    with pytest.raises(KptError, match="cannot be measured"):
        measure_loader(make())
