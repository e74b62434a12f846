"""Finding the repeated blocks of a model, and compiling them where they are."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from kpt_lightning.decision import Accepted, Decision, Rejected


def decide_blocks(model: nn.Module) -> list[Decision]:
    """One decision for each repeated block: the children of the outermost ``nn.ModuleList`` of like modules.

    Blocks are compiled one by one instead of the model as a whole because masks are then built outside, in eager
    mode: transformers builds a dense mask while it is traced, and attention then loses its causal fast path.
    Blocks inside a module that the user compiled are left out.

    Args:
        model: Any module; not changed.
    """
    decisions: list[Decision] = []
    for name, block in _blocks("", model):
        kind = type(block).__name__
        if is_compiled(block):
            decisions.append(Rejected(name, f"{kind}: compiled by the user already"))
        else:
            decisions.append(Accepted(name, kind))
    return decisions


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` or ``module.compile()`` was called on it."""
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


def compile_blocks(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Compile the named modules in place; state-dict keys stay. Tracing happens at the first call.

    Returns:
        The modules, for :func:`restore_blocks`.
    """
    modules = dict(model.named_modules())
    blocks = [modules[name] for name in names]
    for block in blocks:
        # Past a method of the same name that the block's class may have.
        nn.Module.compile(block)
    return blocks


def restore_blocks(blocks: Iterable[nn.Module]) -> None:
    """Undo :func:`compile_blocks`."""
    for block in blocks:
        vars(block).pop("_compiled_call_impl", None)


def _blocks(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if is_compiled(module):
        return
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList) and _alike(child):
            yield from ((f"{path}.{key}", block) for key, block in child.named_children())
        else:
            yield from _blocks(path, child)


def _alike(blocks: nn.ModuleList) -> bool:
    kinds = {type(block) for block in blocks}
    with_weights = all(any(True for _ in block.parameters()) for block in blocks)
    # A list of bare linear layers is no list of blocks: compiling each would fuse nothing.
    return len(blocks) > 1 and len(kinds) == 1 and with_weights and any(True for _ in blocks[0].children())
