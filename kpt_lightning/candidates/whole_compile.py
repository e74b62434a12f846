"""A module that its user compiled as a whole: finding the repeated blocks in it, and setting its compilation aside."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from kpt_lightning.candidates.compile_blocks import decide_blocks, is_compiled


def compiled_wholes(model: nn.Module) -> dict[str, list[str]]:
    """Name of each outermost compiled module to the names of the repeated blocks in it; those without blocks too.

    Args:
        model: Any module; ``model.compile()`` and ``torch.compile(model)`` are both found, wherever it lies inside.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if is_compiled(module) and not any(_inside(name, other) for other in found):
            with set_aside([module]):
                found[name] = _blocks(name, module)
    return found


@contextmanager
def set_aside(modules: list[nn.Module]) -> Iterator[None]:
    """Run compiled modules as plain ones, and compile them again afterwards; what was compiled is kept."""
    with ExitStack() as undo:
        for module in modules:
            if isinstance(module, torch._dynamo.OptimizedModule):
                inner: nn.Module = module._orig_mod
                undo.callback(_replace(module, "forward", inner.__call__))
                module = inner
            if module._compiled_call_impl is not None:
                undo.callback(_replace(module, "_compiled_call_impl", None))
        yield


def _blocks(name: str, module: nn.Module) -> list[str]:
    prefix = f"{name}." if name else ""
    if isinstance(module, torch._dynamo.OptimizedModule):
        module, prefix = module._orig_mod, f"{prefix}_orig_mod."
    return [prefix + each.subject for each in decide_blocks(module) if each]


def _replace(module: nn.Module, attribute: str, value: object) -> Callable[[], None]:
    # Past nn.Module.__setattr__ and OptimizedModule's, which hands attributes on to the module inside.
    before = vars(module)[attribute]
    vars(module)[attribute] = value

    def restore() -> None:
        vars(module)[attribute] = before

    return restore


def _inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")
