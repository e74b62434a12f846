"""bf16 autocast around the forward pass of a model that runs in fp32, where no trainer is in charge of precision."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.gates import Numerics


class AutocastBf16:
    """Outputs are cast back to fp32 by whoever drives the model, so that a loss outside sees fp32."""

    name = "autocast_bf16"
    level = Level.BALANCED
    # Before everything else: what is chosen and compiled afterwards sees bf16.
    stage = Stage.WEIGHTS
    turn = 1
    numerics = Numerics.PRECISION
    features: tuple[str, ...] = ("bf16",)
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """For fp32 models in a loop that sets no precision of its own."""
        if not subject.owns_precision:
            return [Rejected(self.name, "the trainer is in charge of precision; set precision='bf16-mixed' there")]
        if subject.compute_dtype is not torch.float32:
            return [Rejected(self.name, f"the model runs in {subject.compute_dtype} already")]
        return [Change(candidate=self.name, reason="matrix products in bf16, fp32 weights")]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> Any:
        """Add the context."""
        kind = subject.device.type

        def context() -> torch.autocast:
            return torch.autocast(kind, dtype=torch.bfloat16)

        subject.contexts.insert(0, context)
        before, subject.compute_dtype = subject.compute_dtype, torch.bfloat16
        return context, before

    def undo(self, subject: Subject, applied: Any) -> None:
        """Take the context away."""
        context, subject.compute_dtype = applied
        subject.contexts.remove(context)


CANDIDATE = AutocastBf16()
