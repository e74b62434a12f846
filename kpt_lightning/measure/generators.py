"""Generators of random numbers that a dataset keeps for itself, put back after it was read."""

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

_LARGEST = 1000
"""Containers with more entries hold data."""


@contextmanager
def generators_kept(loader: DataLoader[Any]) -> Iterator[list[str]]:
    """Put back generators of the dataset and the collate function; afterwards the list names those that moved."""
    found = [*_inside("dataset", loader.dataset, set()), *_inside("collate_fn", loader.collate_fn, set())]
    before = [(name, read(), write, read) for name, read, write in found]
    moved: list[str] = []
    try:
        yield moved
    finally:
        for name, state, write, read in before:
            if not _same(read(), state):
                moved.append(name)
                write(state)


Access = tuple[str, Callable[[], Any], Callable[[Any], Any]]


def _inside(name: str, value: Any, seen: set[int]) -> Iterator[Access]:
    """Name, reader and writer of each generator that is reached through attributes, containers and closures."""
    atom = isinstance(value, int | float | str | bytes | type | Tensor | nn.Module) or value is None
    if atom or id(value) in seen:
        return
    seen.add(id(value))
    if (access := _access(value)) is not None:
        yield name, *access
        return
    parts: list[tuple[str, Any]] = []
    if isinstance(value, Mapping | Sequence):
        if len(value) <= _LARGEST:
            entries = value.items() if isinstance(value, Mapping) else enumerate(value)
            parts = [(f"{name}[{key!r}]", each) for key, each in entries]
    elif hasattr(value, "__dict__") and not isinstance(value, type(sys)):
        parts = [(f"{name}.{key}" if name != "dataset" else key, each) for key, each in vars(value).items()]
    parts += [(name, content) for cell in getattr(value, "__closure__", None) or () for content in _content(cell)]
    # Of a method, and of functools.partial.
    places = ("__self__", "func", "args", "keywords")
    parts += [(name, getattr(value, key)) for key in places if callable(value) and hasattr(value, key)]
    for key, each in parts:
        yield from _inside(key, each, seen)


def _access(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    # A subclass may have no state, as SystemRandom.
    if type(value) is random.Random:
        return value.getstate, value.setstate
    if numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return value.get_state, value.set_state
    return None


def _content(cell: Any) -> list[Any]:
    """Nothing where the cell of a closure is not filled yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    return bool(_listed(one) == _listed(two))


def _listed(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _listed(each) for key, each in state.items()}
    if isinstance(state, tuple):
        return [_listed(each) for each in state]
    return state.tolist() if hasattr(state, "tolist") else state
