"""Modules and compiled code: hooks on what was compiled are compiled in too, or not seen at all."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def outside_compiled(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that may get a hook, in the order of ``named_modules``.

    Left out are modules compiled in place with all that is in them, and what is inside of a ``torch.compile(module)``.
    """
    hidden: list[nn.Module] = []
    for name, module in model.named_modules():
        if any(module is each for each in hidden):
            continue
        wrapped = "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.OptimizedModule)
        if wrapped or module._compiled_call_impl is not None:
            hidden += [each for each in module.modules() if each is not module]
        if module._compiled_call_impl is None:
            yield name, module


def run_uncompiled() -> AbstractContextManager[object]:
    """What was compiled runs as Python while entered, hooks inside of it too; its code is kept."""
    # Where the compiler was never loaded nothing is compiled, and loading it takes a second.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
