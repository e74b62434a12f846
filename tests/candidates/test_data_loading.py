import io
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.data_loading import CANDIDATE
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.measure.loading import sample_batches

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
needs_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")


class Slow(Dataset[Tensor]):
    """Each sample waits, as for a disk."""

    def __init__(self) -> None:
        self.file: Any = None

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(0.004)
        return torch.tensor([index])


class Computing(Slow):
    def __getitem__(self, index: int) -> Tensor:
        end = time.process_time() + 0.004
        while time.process_time() < end:
            pass
        return torch.tensor([index])


class Epochs(Slow):
    def set_epoch(self, epoch: int) -> None: ...


class Caching(Slow):
    def __getitem__(self, index: int) -> Tensor:
        self.file = self.file or io.BytesIO(b"opened")
        return super().__getitem__(index)


class OnDevice(Slow):
    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(index).to("meta")


class Augmenting(Slow):
    """With random numbers of its own."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.transforms = [partial(next_of, generator)]

    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(index) + int(self.transforms[0]() * 0)


def next_of(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return float(generator.random())


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        raise AssertionError("consumed")


class OwnLoader(DataLoader[Any]):
    pass


def subject(loader: Any, step_seconds: float | None = 1e-3) -> Subject:
    model = nn.Linear(1, 1)
    device = torch.device("cpu")
    return Subject(
        model=model, profile=detect(), config=KptConfig(), device=device, loader=loader, step_seconds=step_seconds
    )


def facts(loader: DataLoader[Any]) -> dict[str, Any]:
    return dict(vars(loader))


def reason(answer: Any) -> str:
    (only,) = answer
    assert isinstance(only, Rejected)
    return only.reason


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@needs_cores
def test_a_loader_that_training_waits_for_gets_workers_gives_the_same_batches_and_goes_back() -> None:
    loader = DataLoader(Slow(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5))
    on = subject(loader, 20e-3)
    exact = [batch.tolist() for batch in loader]
    before = facts(loader)
    loader.generator.manual_seed(5)
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change)
    assert facts(loader) == before
    assert change.setting["num_workers"] >= 1
    assert change.setting["persistent_workers"] is True
    assert change.setting["pin_memory"] is False
    assert change.predicted > 1.0
    assert "a step takes 20 ms" in change.reason
    applied = CANDIDATE.apply(on, Change.from_dict(change.to_dict()).setting)
    assert [batch.tolist() for batch in loader] == exact
    assert type(loader._iterator).__name__ == "_MultiProcessingDataLoaderIter"
    CANDIDATE.undo(on, applied)
    assert facts(loader) == before
    loader.generator.manual_seed(5)
    assert [batch.tolist() for batch in loader] == exact


@needs_cores
def test_workers_do_not_outlive_an_epoch_of_a_dataset_that_is_told_of_epochs() -> None:
    (change,) = CANDIDATE.applies(subject(DataLoader(Epochs(), batch_size=8), 20e-3))
    assert change.setting["persistent_workers"] is False


def with_handle(path: Path) -> Slow:
    dataset = Slow()
    dataset.file = path.open()
    return dataset


DECLINED: dict[str, tuple[Callable[[Path], Any], float | None, str]] = {
    "none": (lambda _: None, 1e-3, "no data loader"),
    "list": (lambda _: [torch.zeros(1)], 1e-3, "builtins.list is not"),
    "generator": (lambda _: (x for x in range(2)), 1e-3, "generator is not"),
    "subclass": (lambda _: OwnLoader(Slow()), 1e-3, "OwnLoader is not"),
    "iterable": (lambda _: DataLoader(Endless()), 1e-3, "gives each batch once"),
    "workers": (lambda _: DataLoader(Slow(), num_workers=1), 1e-3, "num_workers=1 was set by you"),
    "no step": (lambda _: DataLoader(Slow()), None, "not measured"),
    "fast": (lambda _: DataLoader(TensorDataset(torch.zeros(8))), 10.0, "does not wait for data"),
    "caching": (lambda _: DataLoader(Caching(), batch_size=8), 1e-3, "changes 'file'"),
    "open file": (lambda path: DataLoader(with_handle(path), batch_size=8), 1e-3, "cannot share"),
    "on a device": (lambda _: DataLoader(OnDevice(), batch_size=8), 1e-3, "on a device"),
    "computing": (lambda _: DataLoader(Computing(), batch_size=8), 1e-3, "on the cores that train"),
}


@pytest.mark.parametrize("case", DECLINED)
@needs_cores
def test_where_workers_are_no_help_or_no_use_the_reason_says_so(case: str, tmp_path: Path) -> None:
    make, step, why = DECLINED[case]
    (tmp_path / "data").write_text("x")
    loader = make(tmp_path / "data")
    found = CANDIDATE.applies(subject(loader, step))
    if case == "computing" and isinstance(found[0], Change):
        # Work of others took the cores while it was timed: the loader then looks as if it waited.
        found = CANDIDATE.applies(subject(loader, step))
    assert why in reason(found)
    if case == "open file":
        loader.dataset.file.close()


GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "python": lambda: random.Random(3),
    "numpy": lambda: numpy.random.default_rng(3),
    "old numpy": lambda: numpy.random.RandomState(3),
}


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("where", ["attribute", "collate function"])
@needs_cores
def test_a_generator_of_the_datasets_own_is_put_back_and_declined(kind: str, where: str) -> None:
    generator, twin = GENERATORS[kind](), GENERATORS[kind]()

    def collate(samples: list[Tensor]) -> Tensor:
        return torch.stack(samples) + int(next_of(generator) * 0)

    inside = where == "attribute"
    loader = DataLoader(Augmenting(generator), 8) if inside else DataLoader(Slow(), 8, collate_fn=collate)
    why = reason(CANDIDATE.applies(subject(loader)))
    assert ("changes 'transforms[0][0]'" if inside else "changes 'collate_fn'") in why
    sample_batches(loader, 2)
    assert next_of(generator) == next_of(twin)


def test_a_stored_setting_is_refused_for_another_kind_of_loader() -> None:
    setting = {"num_workers": 1, "pin_memory": False, "persistent_workers": True, "prefetch_factor": 2}
    with pytest.raises(ConfigError, match="Make a new plan"):
        CANDIDATE.apply(subject([1, 2]), setting)


@pytest.mark.cuda
def test_on_cuda_batches_come_pinned() -> None:
    loader = DataLoader(Slow(), batch_size=8)
    on = subject(loader, 20e-3)
    on.device = torch.device("cuda")
    (change,) = CANDIDATE.applies(on)
    assert change.setting["pin_memory"] is True
    applied = CANDIDATE.apply(on, change.setting)
    assert next(iter(loader)).is_pinned()
    CANDIDATE.undo(on, applied)
    assert not next(iter(loader)).is_pinned()
