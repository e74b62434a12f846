"""How long a data loader takes for one batch, measured without consuming anything of it."""

import itertools
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from kpt_lightning.errors import KptError
from kpt_lightning.measure.generators import generators_kept
from kpt_lightning.measure.statistics import median

MAX_SECONDS = 5.0
"""A measurement ends after this long, with the batches that it has."""

# Their keys are the numbers below len(dataset), so batches can be made without asking the sampler.
_SAMPLERS = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)


@dataclass(frozen=True, slots=True)
class Loading:
    """What loading a batch takes.

    Attributes:
        seconds: Median time of one batch.
        busy: Share of it in which this process computed; the rest is waiting for a disk or a network.
        changes: Attribute of the dataset that reading it changed, or a generator of random numbers in it or in the
            collate function, which was put back; None where all stays as it is.
        batch: The last batch.
    """

    seconds: float
    busy: float
    changes: str | None
    batch: Any


def why_not_measurable(loader: DataLoader[Any]) -> str | None:
    """Why no batch can be loaded beside those of the training, or None."""
    if isinstance(loader.dataset, IterableDataset):
        return "an iterable dataset gives each batch once; reading one would take it from the training"
    if type(loader.sampler) not in _SAMPLERS:
        return f"keys of a {type(loader.sampler).__name__} are known to itself alone"
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return f"batches of a {type(loader.batch_sampler).__name__} are known to itself alone"
    return None


def measure_loader(loader: DataLoader[Any], batches: int = 5) -> Loading:
    """Load batches in this process, whatever ``num_workers`` is.

    The samples are read from the dataset, not through the sampler; random state is put back, that of generators which
    the dataset holds too.

    Args:
        loader: Of a map-style dataset.
        batches: How many to load, after one that is not counted.

    Raises:
        KptError: See :func:`why_not_measurable`.
    """
    keys = _keys(loader, batches + 1)
    before, busy, times, batch = _attributes(loader.dataset), 0.0, [], None
    with _random_state_kept(), generators_kept(loader) as moved:
        for each in keys:
            cpu, start = time.process_time(), time.perf_counter()
            batch = _fetch(loader, each)
            times.append(time.perf_counter() - start)
            busy = time.process_time() - cpu
            if sum(times) > MAX_SECONDS:
                break
    after = _attributes(loader.dataset)
    changed = next((name for name in before.keys() | after.keys() if before.get(name) != after.get(name)), None)
    changed = next(iter(moved), changed)
    seconds = median(times[1:] or times)
    assert seconds is not None
    return Loading(seconds, min(1.0, busy / times[-1]), changed, batch)


def measure_workers(loader: DataLoader[Any], settings: Mapping[str, Any], batches: int = 8) -> float:
    """Seconds between batches when worker processes load them, start-up not counted.

    Args:
        loader: Of a map-style dataset; not changed.
        settings: ``num_workers`` and other arguments of ``DataLoader`` that differ from the loader's.
        batches: How many are counted.

    Raises:
        KptError: See :func:`why_not_measurable`.
        RuntimeError: A worker died.
    """
    # Whatever the workers hold ready when the clock starts was loaded before.
    ready = settings["num_workers"] * settings.get("prefetch_factor", 2)
    keys = _keys(loader, batches + ready + 1, skip=batches)
    known: dict[str, Any] = {
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
        "timeout": loader.timeout,
    }
    # A generator of its own, for the loader draws its base seed from one.
    known["generator"] = torch.Generator().manual_seed(0)
    with _random_state_kept():
        sampling = (
            {"batch_sampler": keys} if loader.batch_sampler is not None else {"sampler": keys, "batch_size": None}
        )
        iterator = iter(DataLoader(loader.dataset, **sampling, **{**known, **settings}))
        first = list(itertools.islice(iterator, ready + 1))
        start, count = time.perf_counter(), 0
        for count, _ in enumerate(iterator, start=1):  # noqa: B007
            if time.perf_counter() - start > MAX_SECONDS:
                break
        seconds = (time.perf_counter() - start) / max(count, 1)
    del iterator, first
    return seconds


def sample_batches(loader: DataLoader[Any], count: int) -> list[Any]:
    """A few batches such as the loader gives, without taking any from it.

    Raises:
        KptError: See :func:`why_not_measurable`.
    """
    with _random_state_kept(), generators_kept(loader):
        return [_fetch(loader, each) for each in _keys(loader, count)]


def _keys(loader: DataLoader[Any], batches: int, skip: int = 0) -> list[Any]:
    """Keys of batches, spread over the dataset as a sampler of its kind would."""
    if reason := why_not_measurable(loader):
        raise KptError(f"the data loader cannot be measured: {reason}. Choose num_workers yourself")
    length = len(loader.dataset)  # type: ignore[arg-type]
    size = loader.batch_size if loader.batch_sampler is not None and loader.batch_size else 1
    ordered = type(loader.sampler) is SequentialSampler
    # 7919 is prime, so that strides meet all samples of any dataset that is no multiple of it.
    stride = 1 if ordered or length % 7919 == 0 else 7919
    flat = [(skip * size + place) * stride % length for place in range(batches * size)]
    groups = [flat[start : start + size] for start in range(0, len(flat), size)]
    return groups if loader.batch_sampler is not None else flat


def _fetch(loader: DataLoader[Any], keys: Any) -> Any:
    """As torch's own fetcher for map-style datasets: torch/utils/data/_utils/fetch.py."""
    dataset: Any = loader.dataset
    if loader.batch_sampler is None:
        return loader.collate_fn(dataset[keys])
    many = getattr(dataset, "__getitems__", None)
    return loader.collate_fn(many(keys) if many else [dataset[key] for key in keys])


def _attributes(dataset: Any) -> dict[str, Any]:
    """What tells whether an attribute changed: which object it is, and its value or how long it is."""
    found: dict[str, Any] = {}
    for name, value in getattr(dataset, "__dict__", {}).items():
        if isinstance(value, Dataset):
            found.update({f"{name}.{key}": each for key, each in _attributes(value).items()})
        size = len(value) if isinstance(value, (Sequence, Mapping, set)) else None
        found[name] = value if isinstance(value, (int, float, str)) else (id(value), size)
    return found


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, state = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
