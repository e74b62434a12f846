"""What a module calls in place of its forward pass once it is compiled, in a frame that torch.compile really traces."""

import weakref
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

_CODES: "weakref.WeakKeyDictionary[type[nn.Module], dict[str, CodeType]]" = weakref.WeakKeyDictionary()


def compiled_call(module: nn.Module, backend: Callable[..., Any], kind: str = "call") -> Callable[..., Any]:
    """A compiled function that calls ``module``, hooks included; tracing happens at its first call.

    ``nn.Module.compile`` gives torch a frame of its own file, which dynamo never traces: it goes on to the frames that
    are called from there, of which those in ``torch.nn`` are left alone as well. An ``nn.Sequential`` or an
    ``nn.TransformerEncoderLayer`` is then not compiled at all, without a word
    (torch 2.13, ``torch/_dynamo/eval_frame.py``, where the frame named ``_call_impl`` is exempt from being wrapped).

    Modules of one class share their code, so that one graph serves like blocks. Classes do not: torch counts
    recompilations, and learns which sizes vary, by code and by its name.

    Args:
        module: Which of its parameters are trained is looked up at each call, for torch 2.11 keeps the graph of before
            when one is unfrozen, whose gradient is then lost without a word
            (https://github.com/pytorch/pytorch/pull/177158).
        backend: As ``torch.compile`` takes it.
        kind: Modules of one class share their code for each of these words.
    """
    # FSDP2 puts other Parameters in the place of these.
    owners = [each._parameters for each in module.modules() if each._parameters]
    compiled = torch.compile(_traced(module, kind), backend=backend)

    def call(*args: Any, **kwargs: Any) -> Any:
        weights = (each for owner in owners for each in owner.values() if each is not None)
        return compiled("".join("t" if each.requires_grad else "f" for each in weights) + ".", *args, **kwargs)

    return call


def forget(module: nn.Module, kind: str) -> None:
    """Drop what was compiled for the class of ``module`` under this word, and the memory that it holds."""
    code = _CODES.get(type(module), {}).pop(kind, None)
    if code is not None:
        torch._C._dynamo.eval_frame.reset_code(code)


def _traced(module: nn.Module, kind: str) -> Callable[..., Any]:
    traced: Any = module

    def call(trained: str, /, *args: Any, **kwargs: Any) -> Any:
        # What is read is guarded: the graph belongs to this text.
        if not trained:
            raise ValueError("no text of what is trained")
        return traced._call_impl(*args, **kwargs)

    owner = type(module)
    codes = _CODES.setdefault(owner, {})
    if kind not in codes:
        codes[kind] = call.__code__.replace(co_name=f"{kind} of {owner.__module__}.{owner.__qualname__}")
    return FunctionType(codes[kind], call.__globals__, "call", None, call.__closure__)
