"""Activation checkpointing of the repeated blocks: less memory for one more forward pass."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.compile_blocks import decide_blocks
from kpt_lightning.candidates.key_value_cache import restore_cache, switch_off_cache
from kpt_lightning.candidates.memory_shortage import NOT_SHORT, shortage
from kpt_lightning.candidates.recomputed import keep_again, recompute
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.attempt import Failure, attempt
from kpt_lightning.validation.calls import ModuleCall, TensorSpec
from kpt_lightning.validation.draw import draw, foreign_argument
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.state import preserved

# Backward takes two forward passes' work (a GEMM for each of two gradients), so one more forward pass makes 3 parts 4.
_SPEED = 0.75


class ActivationCheckpointing:
    """``torch.utils.checkpoint`` around each repeated block, inside its compiled code where it is compiled."""

    name = "activation_checkpointing"
    level = Level.CONSERVATIVE
    stage = Stage.MEMORY
    turn = 60
    numerics = Numerics.SAME
    features: tuple[str, ...] = ()
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change for all blocks, with the memory that a run of each block was seen to keep."""
        short = shortage(subject)
        if short is None:
            return [Rejected(self.name, NOT_SHORT)]
        names = [each.subject for each in decide_blocks(subject.model) if each]
        if not names:
            return [Rejected(self.name, "the model has no repeated blocks that the user did not compile")]
        modules = dict(subject.model.named_modules())
        kept: list[int] = []
        for name in names:
            found = _why_not(modules[name]) or _kept_bytes(modules[name], subject.calls.get(name), subject)
            if isinstance(found, str):
                return [Rejected(self.name, f"{name!r}: {found}")]
            kept.append(found)
        # While one block is computed again, its activations are there as before.
        saves = sum(kept) - max(kept)
        if saves <= 0:
            return [Rejected(self.name, "the blocks keep nothing beyond their inputs")]
        reason = f"{short}; {len(names)} blocks keep {sum(kept) / 2**20:.3g} MiB beyond their inputs"
        setting = {"blocks": names}
        return [
            Change(candidate=self.name, setting=setting, reason=reason, predicted=_SPEED, saves_bytes=saves),
        ]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> ExitStack:
        """Change the blocks; a key-value cache, which a second pass would fill again, is switched off."""
        modules = dict(subject.model.named_modules())
        for name in setting["blocks"]:
            reason = _why_not(modules[name]) if name in modules else "is no module of this model"
            if reason:
                raise ConfigError("plan.activation_checkpointing", name, reason, "Make a new plan")
        blocks = [modules[name] for name in setting["blocks"]]
        with ExitStack() as undo:
            undo.callback(restore_cache, switch_off_cache(subject.model))
            undo.callback(keep_again, blocks)
            recompute(blocks)
            return undo.pop_all()

    def undo(self, subject: Subject, applied: ExitStack) -> None:
        """Restore blocks and cache."""
        applied.close()


CANDIDATE = ActivationCheckpointing()


def _why_not(block: nn.Module) -> str | None:
    if "forward" in vars(block):
        return "its forward was replaced on the object by another library"
    if any(getattr(each, "gradient_checkpointing", False) is True for each in block.modules()):
        return "gradient checkpointing is on already"
    return None


def _kept_bytes(block: nn.Module, call: ModuleCall | None, subject: Subject) -> int | str:
    """Bytes that one forward pass keeps for backward beyond inputs and weights, or why it cannot be checkpointed."""
    if call is None:
        return "it was not called in the recorded pass"
    call = _without_cache(call)
    if (kind := foreign_argument(call)) is not None:
        return f"it is called with a {kind}, which a second forward pass may change"
    with preserved(block):
        before = _versions(block)
        result = attempt(lambda: _run(block, call, subject))
        if isinstance(result, Failure):
            return f"it does not run by itself: {result.text}"
        if (changed := _changed(before, _versions(block))) is not None:
            return f"its forward pass changes {changed!r}, and a second one would change it again"
    return result.value


def _run(block: nn.Module, call: ModuleCall, subject: Subject) -> int:
    args, kwargs = draw(call, scale=1.0, seed=0)
    inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    recorded = [each for each in tree_leaves((call.args, call.kwargs)) if isinstance(each, TensorSpec | Tensor)]
    for each, spec in zip(inputs, recorded, strict=True):
        each.requires_grad_(spec.requires_grad)
    known = {each.untyped_storage().data_ptr() for each in [*inputs, *block.parameters(), *block.buffers()]}
    # Autocast's copies of weights stay until the forward pass of the whole model ends, checkpointed or not.
    weights = {shape for each in block.parameters() for shape in (each.shape, each.shape[::-1])}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape not in weights:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    cast = nullcontext() if call.autocast is None else torch.autocast(subject.device.type, call.autocast)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with subject.forward_context(), torch.enable_grad(), cast, hooks:
        output = block(*args, **kwargs)
    del output
    return sum(size for pointer, size in sizes.items() if pointer not in known)


def _without_cache(call: ModuleCall) -> ModuleCall:
    """Without a key-value cache of transformers, as it is called once :meth:`apply` switched the cache off."""

    def change(item: Any) -> Any:
        return None if type(item).__module__ == "transformers.cache_utils" else item

    args, kwargs = tree_map(change, (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs)


def _versions(block: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(each), each._version) for name, each in block.named_buffers()}


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    return next((name for name in after if before.get(name) != after[name]), None)
