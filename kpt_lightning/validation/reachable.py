"""What hangs on a model: its modules, and all that can change in place through their attributes."""

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})

# Their objects reach the whole program, and look after their own state.
_PACKAGES = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_fabric", "kpt_lightning"})


@dataclass(slots=True)
class Reachable:
    """Found by :func:`survey`.

    Attributes:
        modules: The model, its submodules, and modules kept in plain containers, where torch does not see them.
        parameters: Every ``nn.Parameter``.
        tensors: Every other tensor: buffers, attributes, and what containers hold.
        restore: Put contents of namespaces, containers, arrays and generators back to what they were at the survey.
    """

    modules: list[nn.Module] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    restore: list[Callable[[], None]] = field(default_factory=list)


def survey(*roots: object) -> Reachable:
    """Walk through attributes, containers and objects of the user's own classes; each is met once, cycles too.

    Objects of installed packages are left alone, as are those that hold a model, data or an optimizer, closures,
    iterators and class attributes.
    """
    found = Reachable()
    waiting: list[Any] = list(roots)
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if type(value) in _ATOMS or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Parameter):
            found.parameters.append(value)
        elif isinstance(value, Tensor):
            found.tensors.append(value)
        elif isinstance(value, nn.Module):
            found.modules.append(value)
            waiting.append(vars(value))
        else:
            waiting.extend(_inside(value, found.restore))
    return found


def _inside(value: Any, restore: list[Callable[[], None]]) -> Iterator[Any]:
    """What ``value`` holds; what puts its content back is added to ``restore``."""
    if isinstance(value, dict):
        restore.append(_dict(value))
        yield from value.values()
    elif isinstance(value, list | deque):
        restore.append(_sequence(value))
        yield from value
    elif isinstance(value, tuple):
        yield from value
    elif isinstance(value, set):
        restore.append(_set(value))
    elif (back := _random_state(value) or _array(value)) is not None:
        restore.append(back)
    elif _is_users(type(value)) and hasattr(value, "__dict__") and not _owns(value):
        yield vars(value)


def _dict(value: dict[Any, Any]) -> Callable[[], None]:
    # Past methods that a subclass may have; an OrderedDict keeps its order in a list of its own.
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    items = dict(kind.items(value))

    def restore() -> None:
        now = dict(kind.items(value))
        for key in now.keys() - items.keys():
            kind.__delitem__(value, key)
        for key, item in items.items():
            # Code compiled for this dictionary is looked up again after every write to it.
            if key not in now or now[key] is not item:
                kind.__setitem__(value, key, item)
        if list(kind.keys(value)) != list(items):
            for key, item in items.items():
                kind.__delitem__(value, key)
                kind.__setitem__(value, key, item)

    return restore


def _sequence(value: Any) -> Callable[[], None]:
    items = list(value)

    def restore() -> None:
        if len(value) == len(items) and all(one is two for one, two in zip(value, items, strict=True)):
            return
        if isinstance(value, list):
            list.__setitem__(value, slice(None), items)
        else:
            deque.clear(value)
            deque.extend(value, items)

    return restore


def _set(value: set[Any]) -> Callable[[], None]:
    items = set(value)

    def restore() -> None:
        if set.__ne__(value, items):
            set.clear(value)
            set.update(value, items)

    return restore


def _random_state(value: Any) -> Callable[[], None] | None:
    if isinstance(value, torch.Generator):
        return partial(_put, value.set_state, value.get_state())
    # A subclass may have no state, as SystemRandom.
    if type(value) is random.Random:
        return partial(_put, value.setstate, value.getstate())
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return partial(_put, value.set_state, value.get_state())
    return None


def _put(setter: Callable[[Any], object], state: Any) -> None:
    setter(state)


def _array(value: Any) -> Callable[[], None] | None:
    numpy: Any = sys.modules.get("numpy")
    # A memory map is a subclass, and larger than memory.
    if numpy is None or type(value) is not numpy.ndarray or not value.flags.writeable:
        return None
    copy = value.copy()

    def restore() -> None:
        value[...] = copy

    return restore


def _owns(value: Any) -> bool:
    """Whether an object holds a model or its data: it is the program around a model, and no part of the model."""
    kinds = (nn.Module, torch.optim.Optimizer, torch.utils.data.Dataset, torch.utils.data.DataLoader)
    return any(isinstance(each, kinds) for each in vars(value).values())


def _is_users(kind: type) -> bool:
    """Whether a class and all its bases come from files of the user's, not from an installed package."""
    return all(base is object or _from_users_file(base) for base in kind.__mro__)


def _from_users_file(kind: type) -> bool:
    top = kind.__module__.partition(".")[0]
    # Bases without state of their own.
    if top in ("typing", "abc"):
        return True
    if top in _PACKAGES or top == "builtins" or top in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return file is None or not {"site-packages", "dist-packages"} & set(Path(file).parts)
