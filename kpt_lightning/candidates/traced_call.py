"""A frame that torch.compile really traces."""

import weakref
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_CODES: "weakref.WeakKeyDictionary[type[nn.Module], CodeType]" = weakref.WeakKeyDictionary()


def traced_call(module: nn.Module) -> Callable[..., Any]:
    """A function that calls ``module``, hooks included, to be given to ``torch.compile``.

    ``nn.Module.compile`` gives torch a frame of its own file, which dynamo never traces: it goes on to the frames that
    are called from there, of which those in ``torch.nn`` are left alone as well. An ``nn.Sequential`` or an
    ``nn.TransformerEncoderLayer`` is then not compiled at all, without a word
    (torch 2.13, ``torch/_dynamo/eval_frame.py``, where the frame named ``_call_impl`` is exempt from being wrapped).

    Modules of one class share their code, so that one graph serves like blocks. Classes do not: torch counts
    recompilations, and learns which sizes vary, by code and by its name.
    """
    traced: Any = module

    def call(*args: Any, **kwargs: Any) -> Any:
        return traced._call_impl(*args, **kwargs)

    kind = type(module)
    if kind not in _CODES:
        _CODES[kind] = call.__code__.replace(co_name=f"call of {kind.__module__}.{kind.__qualname__}")
    return FunctionType(_CODES[kind], call.__globals__, "call", None, call.__closure__)
