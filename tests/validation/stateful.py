"""Models with state of many kinds, and a description of all that hangs on one; for the tests of ``preserved``."""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Meter:
    """A helper of a user's, as research code keeps them on modules."""

    def __init__(self) -> None:
        self.count = 0
        self.history: list[float] = []


class HasState(nn.Module):
    """Keeps everything that a forward pass may change, in every way that Python offers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.name = "before"
        self.history: list[Any] = [1, [2, 3], {"deep": [4]}]
        self.table: dict[str, Any] = {"b": 1, "a": torch.zeros(2)}
        self.ordered = OrderedDict(b=1, a=2)
        self.groups: defaultdict[str, list[int]] = defaultdict(list, x=[1])
        self.votes = Counter("aab")
        self.queue = deque([1, 2], maxlen=2)
        self.members = {1, 2}
        self.pair = (torch.zeros(3), [1])
        self.cache: Tensor | None = torch.ones(2, 2)
        self.array = np.arange(3.0)
        self.meter = Meter()
        self.generators = [torch.Generator().manual_seed(1), random.Random(1)]
        self.numpy_generators = (np.random.default_rng(1), np.random.RandomState(1))
        self.register_buffer("bank", torch.zeros(4))
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.name = "after"
        self.history.append(5)
        self.history[1].append(6)
        self.history[2]["deep"].clear()
        self.table["a"].add_(1)
        self.table["c"] = self.table.pop("b")
        self.ordered.move_to_end("b")
        self.groups["x"].append(2)
        self.groups["new"].append(3)
        self.votes["b"] += 7
        self.queue.append(3)
        self.members.symmetric_difference_update({2, 9})
        self.pair[0].fill_(7)
        self.pair[1].append(2)
        self.cache = None if self.cache is None else self.cache * 2
        self.array += 1
        self.meter.count += 1
        self.meter.history.append(0.5)
        self.meter.extra = 1  # type: ignore[attr-defined]
        torch.rand(2, generator=self.generators[0])
        self.generators[1].random()
        self.numpy_generators[0].random()
        self.numpy_generators[1].rand()
        self.bank[0] = 9
        self.none = torch.ones(1)
        self.lazily = [1, 2]
        self.register_buffer("late", torch.ones(1))
        if not hasattr(self, "head"):
            self.head = nn.Linear(4, 4)
        self.linear.weight.requires_grad_(False)
        self.linear.eval()
        out: Tensor = self.head(self.linear(x))
        return out


def described(model: nn.Module) -> Any:
    """Everything that hangs on a model, with the identity of each object and the bits of each tensor."""
    seen: set[int] = set()

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value.requires_grad, value.dtype, value.detach().tolist()
        if isinstance(value, np.ndarray):
            return id(value), value.tolist()
        if isinstance(value, torch.Generator):
            return id(value), value.get_state().tolist()
        if isinstance(value, random.Random):
            return id(value), value.getstate()
        if isinstance(value, np.random.Generator):
            return id(value), repr(value.bit_generator.state)
        if isinstance(value, np.random.RandomState):
            return id(value), repr(value.get_state())
        if id(value) in seen:
            return id(value)
        if isinstance(value, dict):
            seen.add(id(value))
            return id(value), [(key, describe(item)) for key, item in value.items()]
        if isinstance(value, list | tuple | deque):
            seen.add(id(value))
            return id(value), [describe(item) for item in value]
        if isinstance(value, set):
            return id(value), sorted(value)
        if isinstance(value, nn.Module | Meter | SimpleNamespace):
            seen.add(id(value))
            return id(value), [(key, describe(item)) for key, item in sorted(vars(value).items())]
        return repr(value) if isinstance(value, int | float | str) else id(value)

    return describe(model)
