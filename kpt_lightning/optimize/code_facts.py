"""What the code of a model does: a plan was proved against this code, and an edited ``forward`` is another model."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from kpt_lightning.tracking.record import digest

# Their versions are in the key of a plan.
_VERSIONED = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_fabric", "kpt_lightning", "builtins"})
_PLAIN = (int, float, complex, str, bytes, bool, type(None))


def code_facts(model: nn.Module, *functions: Callable[..., Any]) -> str:
    """Hash of the bytecode of the classes of all modules, of hooks, and of other functions that training calls.

    Code of the user's that they call by its name in the module is followed; that of installed packages is not.
    Comments, names of files and line numbers do not count. Equal in each process of one version of Python.

    Args:
        model: With methods of its classes and functions on its modules.
        functions: A loss function or ``training_step``; a loss may be a module.
    """
    found = _Code()
    for module in model.modules():
        found.of_module(module)
    for each in functions:
        found.of_callable(each)
    return digest(sorted(found.texts))


class _Code:
    """A walk that meets each function once."""

    def __init__(self) -> None:
        self.texts: set[str] = set()
        self._seen: set[int] = set()

    def of_module(self, module: nn.Module) -> None:
        self._of_class(type(module))
        hooks = (vars(module).get(name, {}) for name in ("_forward_hooks", "_forward_pre_hooks"))
        for each in [vars(module).get("forward"), *(hook for found in hooks for hook in found.values())]:
            self.of_callable(each)

    def of_callable(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            self.texts.add(f"partial {_plain(value.args)} {_plain(value.keywords)}")
            value = value.func
        if isinstance(value, nn.Module):
            for each in value.modules():
                self.of_module(each)
            return
        value = value.__func__ if isinstance(value, MethodType) else value
        if value is not None:
            self.texts.add(f"calls {getattr(value, '__module__', '')}.{_name(value)}")
        if isinstance(value, FunctionType):
            self._of_function(value)
        elif value is not None and not isinstance(value, type):
            self._of_class(type(value))

    def _of_class(self, kind: type) -> None:
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        for base in kind.__mro__:
            # A driven model has a class of this package over its own.
            if base is object or _versioned(base) or "_kpt_plain" in vars(base):
                continue
            for name, value in vars(base).items():
                self._of_member(f"{base.__module__}.{base.__qualname__}.{name}", value)

    def _of_member(self, name: str, value: Any) -> None:
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        parts = [value.fget, value.fset] if isinstance(value, property) else [value]
        for each in parts:
            if isinstance(each, FunctionType):
                self._of_function(each)
            elif isinstance(each, _PLAIN) and not name.endswith(("__module__", "__doc__", "__firstlineno__")):
                self.texts.add(f"{name} = {each!r}")

    def _of_function(self, function: FunctionType) -> None:
        if id(function) in self._seen or _versioned(function):
            return
        self._seen.add(id(function))
        defaults = _plain(function.__defaults__ or ()), _plain(function.__kwdefaults__ or {})
        self.texts.add(f"{function.__module__}.{function.__qualname__} {_code(function.__code__)} {defaults}")
        for cell in function.__closure__ or ():
            self._of_value(function.__qualname__, _content(cell))
        if _users(function):
            for name in _names(function.__code__):
                self._of_value(name, function.__globals__.get(name))

    def _of_value(self, name: str, value: Any) -> None:
        """What a function refers to: a number counts, code of the user's is followed."""
        if isinstance(value, FunctionType | MethodType | functools.partial | nn.Module):
            self.of_callable(value)
        elif isinstance(value, type):
            if _users(value):
                self._of_class(value)
        elif isinstance(value, _PLAIN):
            self.texts.add(f"{name} = {value!r}")


def _code(code: CodeType) -> str:
    """Instructions with their names and constants, those of inner functions too."""
    constants = [_code(each) if isinstance(each, CodeType) else _constant(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _constant(value: Any) -> str:
    # The order of a set differs between processes.
    return str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _names(each)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _plain(values: Any) -> str:
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    return str([(key, value if isinstance(value, _PLAIN) else type(value).__name__) for key, value in pairs])


def _name(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _versioned(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] in _VERSIONED


def _users(value: Any) -> bool:
    """Whether it comes from a file of the user's, and not from an installed package or Python itself."""
    name = getattr(value, "__module__", None) or ""
    if name.partition(".")[0] in _VERSIONED | sys.stdlib_module_names:
        return name == "__main__"
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is None or not {"site-packages", "dist-packages"} & set(Path(file).parts)
