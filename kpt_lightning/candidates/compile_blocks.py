"""Finding the repeated blocks of a model, and compiling them where they are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.compiled_call import compiled_call
from kpt_lightning.candidates.cuda_graphs import GraphedWhereSmall
from kpt_lightning.candidates.inductor import Inductor
from kpt_lightning.candidates.key_value_cache import restore_cache, switch_off_cache
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.precision.kernel_sizes import LEAST_ELEMENTS
from kpt_lightning.validation.gates import Numerics


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


def decide_graphs(kind: str, several: bool) -> Decision:
    """Whether compiled blocks may be replayed as CUDA graphs; whether that is faster, a trial finds out.

    Args:
        kind: Of the device, as in ``torch.device.type``.
        several: Whether other processes train the same model.
    """
    if kind != "cuda":
        return Rejected("CUDA graphs", f"a {kind} has none")
    if several:
        return Rejected("CUDA graphs", "not measured with several processes: collectives run beside the passes")
    return Accepted("CUDA graphs", f"one launch for a pass of a block, for inputs below {LEAST_ELEMENTS:,} elements")


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` or ``module.compile()`` was called on it."""
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


def compile_blocks(
    model: nn.Module, names: Iterable[str], key: str = "", *, graphs: bool = False
) -> list[nn.Module]:  # fmt: skip
    """Compile the named modules in place; state-dict keys stay. Tracing happens at the first call.

    Args:
        model: Module that holds them.
        names: Their names.
        key: Of the compiled code, see ``candidates.inductor``.
        graphs: Replay them as CUDA graphs where inputs are small.

    Returns:
        The modules, for :func:`restore_blocks`.

    Raises:
        ConfigError: A name is no module of this model.
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in names if name not in modules]:
        raise ConfigError("plan.compile_blocks", unknown[0], "is no module of this model", "Make a new plan")
    blocks = [modules[name] for name in names]
    for block in blocks:
        # What nn.Module.compile does, with a frame that is traced for torch's own classes too.
        call = GraphedWhereSmall(block, key) if graphs else compiled_call(block, Inductor(key))
        block._compiled_call_impl = call  # type: ignore[assignment,unused-ignore]
    return blocks


def restore_blocks(blocks: Iterable[nn.Module]) -> None:
    """Undo :func:`compile_blocks`."""
    for block in blocks:
        compiled = vars(block).pop("_compiled_call_impl", None)
        if isinstance(compiled, GraphedWhereSmall):
            compiled.release()


@contextmanager
def room_for_graphs(blocks: int) -> Iterator[None]:
    """Raise torch's recompile limit, which counts all blocks as one function, to its own value for each block."""
    config: Any = torch._dynamo.config
    before = config.recompile_limit
    config.recompile_limit = before * max(1, blocks)
    try:
        yield
    finally:
        config.recompile_limit = before


class CompileBlocks:
    """Each repeated block compiled by itself, with the key-value cache off so that one graph serves all."""

    name = "compile_blocks"
    level = Level.CONSERVATIVE
    stage = Stage.COMPILE
    turn = 10
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ("compile",)
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """All blocks that nobody compiled yet."""
        decisions = decide_blocks(subject.model)
        names = [each.subject for each in decisions if each]
        if subject.config.compile.blocks is False:
            return [Rejected(self.name, "switched off by compile.blocks=False")]
        if not names:
            reason = decisions[0].reason if decisions else "the model has no repeated blocks"
            return [Rejected(self.name, reason)]
        plain = Change(candidate=self.name, setting={"blocks": names}, reason=f"{len(names)} blocks, in place")
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        verdict = decide_graphs(subject.device.type, several)
        if not verdict:
            return [plain, Rejected(self.name, f"CUDA graphs: {verdict.reason}")]
        setting = {"blocks": names, "graphs": True}
        return [plain, Change(candidate=self.name, setting=setting, reason=f"{plain.reason}; {verdict.reason}")]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> ExitStack:
        """As :func:`compile_blocks`; the stack undoes it."""
        with ExitStack() as undo:
            undo.enter_context(room_for_graphs(len(setting["blocks"])))
            undo.callback(restore_cache, switch_off_cache(subject.model))
            graphs = setting.get("graphs", False)
            undo.callback(restore_blocks, compile_blocks(subject.model, setting["blocks"], subject.key, graphs=graphs))
            return undo.pop_all()

    def undo(self, subject: Subject, applied: ExitStack) -> None:
        """Restore blocks, cache and limit."""
        applied.close()


CANDIDATE = CompileBlocks()


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
