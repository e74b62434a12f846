"""What a command works on: a model that a function of the user's makes, named as FILE:FUNCTION."""

import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kpt_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

FORMS = (
    "Return a model, (model, batch), (model, batch, loss_fn), or a dict of model, batch, loss_fn, optimizer and loader"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the function returned.

    Attributes:
        model: The model, on the device where it is to run.
        batch: One batch on that device, None where the function gives none.
        loss_fn: See ``validation.workload.Workload``.
        optimizer: Of the model's parameters, None where the function gives none.
        loader: The training data loader, None where the function gives none.
    """

    model: "nn.Module"
    batch: Any = None
    loss_fn: Callable[..., Any] | None = None
    optimizer: "Optimizer | None" = None
    loader: "Iterable[Any] | None" = None


def load_target(name: str) -> Target:
    """Import a file or a module, and call a function of it that needs no argument.

    The directory of the file, or the working directory for a module, is first on ``sys.path`` meanwhile. What the code
    itself raises is passed on.

    Args:
        name: "path/to/file.py:function" or "package.module:function".

    Raises:
        ConfigError: There is no such file, module or function, or it returns something else.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise ConfigError("target", name, "names no function", "Write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION")
    is_file = place.endswith(".py")
    directory = Path(place).resolve().parent if is_file else Path.cwd()
    with _first_on_path(str(directory)):
        module = _import_file(name, Path(place).resolve()) if is_file else _import_module(name, place)
        return _target(name, _function(name, module, function)())


def _import_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError("target", name, f"there is no file {path}", "Check the path")
    # Not its own name: a file json.py or model.py would hide another module.
    known_as = f"_kpt_target_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(known_as, path)
    if spec is None or spec.loader is None:
        raise ConfigError("target", name, "is no Python file", "Check the path")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up while it runs.
    sys.modules[known_as] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[known_as]
        raise
    return module


def _import_module(name: str, place: str) -> ModuleType:
    try:
        return import_module(place)
    except ModuleNotFoundError as error:
        # A module that the user's own code misses is another matter.
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise
        step = "Check the name, or write the path of a file that ends in .py"
        raise ConfigError("target", name, f"there is no module {error.name!r}", step) from error


def _function(name: str, module: ModuleType, function: str) -> Callable[[], Any]:
    from torch import nn

    found: Any = module
    for part in function.split("."):
        if not hasattr(found, part):
            raise ConfigError("target", name, f"there is no {function!r} in it", _functions_of(module))
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise ConfigError("target", name, f"{function!r} is {_a(found)}, no function", _functions_of(module))
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        rule = f"{function!r} cannot be called without arguments ({error})"
        raise ConfigError("target", name, rule, "Give its arguments defaults") from error
    call: Callable[[], Any] = found
    return call


def _functions_of(module: ModuleType) -> str:
    own = {key: each for key, each in vars(module).items() if getattr(each, "__module__", "") == module.__name__}
    every = [key for key, each in own.items() if inspect.isfunction(each)]
    return f"Functions there: {', '.join(every)}" if every else f"Write a function there. {FORMS}"


def _target(name: str, result: Any) -> Target:
    from torch import nn
    from torch.optim import Optimizer

    keys = [field.name for field in fields(Target)]
    if isinstance(result, nn.Module):
        result = {"model": result}
    elif isinstance(result, tuple) and 2 <= len(result) <= 3:
        result = dict(zip(keys, result, strict=False))
    elif not isinstance(result, Mapping):
        what = f"a tuple of {len(result)}" if isinstance(result, tuple) else _a(result)
        raise ConfigError("target", name, f"it returned {what}", FORMS)
    if unknown := [key for key in result if key not in keys]:
        raise ConfigError("target", name, f"it returned a dict with {unknown[0]!r}", FORMS)
    target = Target(**{key: result.get(key) for key in keys})
    for key, right in (
        ("model", isinstance(target.model, nn.Module)),
        ("loss_fn", target.loss_fn is None or callable(target.loss_fn)),
        ("optimizer", target.optimizer is None or isinstance(target.optimizer, Optimizer)),
    ):
        if not right:
            raise ConfigError("target", name, f"its {key} is {_a(getattr(target, key))}", FORMS)
    return target


def _a(value: Any) -> str:
    kind = type(value).__name__
    return "None" if value is None else f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


@contextmanager
def _first_on_path(directory: str) -> Iterator[None]:
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        # The code may have changed the list meanwhile.
        if directory in sys.path:
            sys.path.remove(directory)
