"""The dense-mask trap: a causal model that was compiled as a whole attends to every pair and masks half of it.

transformers passes a mask tensor where it may not look at the values of a mask, as while it is traced: attention then
loses its causal kernel, and nobody notices. Blocks that are compiled one by one get their mask from eager code.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from kpt_lightning.attention.call import AttentionCall
from kpt_lightning.attention.masks import causal_masks
from kpt_lightning.attention.packed import packing_advice
from kpt_lightning.attention.proof import describe
from kpt_lightning.candidates import compile_blocks
from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.replay import forward_pass, observe_model
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.candidates.whole_compile import compiled_wholes, set_aside
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.attempt import Failure, attempt
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.state import preserved


class CausalAttention:
    """The user's compilation of the whole gives way to that of the blocks."""

    name = "causal_attention"
    level = Level.CONSERVATIVE
    stage = Stage.COMPILE
    turn = 3
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ("compile",)
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """Where the compiled model attends densely and the same model run in eager mode does not."""
        wholes = {name: blocks for name, blocks in compiled_wholes(subject.model).items() if blocks}
        calls = observe_model(subject)
        if isinstance(calls, Rejected):
            return [Rejected(self.name, calls.reason)]
        dense = [call for call in calls if call.mask is not None and not call.causal]
        if not dense:
            return [
                Rejected(self.name, f"no mask tensor is passed: {'; '.join(each.reason for each in describe(calls))}")
            ]
        if not wholes:
            return [Rejected(self.name, _why_not_proved(subject, dense))]
        with torch.compiler.set_stance("force_eager"):
            plain = observe_model(subject)
        if isinstance(plain, Rejected):
            return [Rejected(self.name, f"in eager mode, {plain.reason}")]
        if sum(call.mask is not None for call in plain) >= len(dense):
            return [Rejected(self.name, _why_not_proved(subject, dense))]
        wasted = next(each.reason for each in describe(dense, causal=True) if not each)
        blocks = [each for names in wholes.values() for each in names]
        text = f"{_titles(wholes)} compiled as a whole: {wasted}; uncompiled it is causal without a mask"
        return [Change(candidate=self.name, setting={"wholes": list(wholes), "blocks": blocks}, reason=text)]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> ExitStack:
        """Set the user's compilation aside and compile the blocks.

        Raises:
            ConfigError: A name is no module of this model.
        """
        modules = dict(subject.model.named_modules())
        if unknown := [name for name in setting["wholes"] if name not in modules]:
            raise ConfigError("plan.causal_attention", unknown[0], "is no module of this model", "Make a new plan")
        with ExitStack() as undo:
            undo.enter_context(set_aside([modules[name] for name in setting["wholes"]]))
            compiled = compile_blocks.CANDIDATE.apply(subject, {"blocks": setting["blocks"]})
            undo.callback(compile_blocks.CANDIDATE.undo, subject, compiled)
            return undo.pop_all()

    def undo(self, subject: Subject, applied: ExitStack) -> None:
        """The blocks as they were, the whole compiled by the user again."""
        applied.close()


CANDIDATE = CausalAttention()


def _titles(wholes: Mapping[str, Any]) -> str:
    return ", ".join(name or "the model" for name in wholes)


def _why_not_proved(subject: Subject, dense: Sequence[AttentionCall]) -> str:
    """What the mask of this batch is; one batch proves nothing of the next."""
    text = describe(dense)[0].reason
    if (advice := packing_advice(subject.batch)) is not None:
        return f"{text}; {advice}"
    run = forward_pass(subject)
    if isinstance(run, Rejected):
        return f"{text}; {run.reason}"

    def look() -> list[bool]:
        with preserved(subject.model), subject.forward_context(), torch.enable_grad():
            return causal_masks(run)

    result = attempt(look)
    if isinstance(result, Failure) or not result.value:
        return f"the model passes a mask of its own: {text}"
    if all(result.value):
        return (
            f"the mask of this batch is just causal, but it may differ in another: {text}; where it never does, pass "
            "is_causal=True without a mask: half of the work"
        )
    return f"the mask is needed, it hides more or less than the future: {text}"
