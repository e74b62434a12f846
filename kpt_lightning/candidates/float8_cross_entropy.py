"""The output head and the loss of a transformers causal language model as one, its matrix products in FP8."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.compile_loss import LOSS_SLOT
from kpt_lightning.candidates.float8 import why_no_float8
from kpt_lightning.candidates.linear_cross_entropy import FusedLoss, decide_head, join, part
from kpt_lightning.candidates.own_kernels import why_no_kernels
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.precision.convert import float8_available
from kpt_lightning.precision.float8_cross_entropy import float8_linear_cross_entropy
from kpt_lightning.precision.layer_check import ROWS
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.numerics import sqnr_db

# The second is of use where the first loses too much: its gradients of logits are not cast for the weight's gradient.
_GRAD_WEIGHTS = ("fp8", "bf16")


class Float8CrossEntropy:
    """Head and loss as one in FP8, logits and softmax in bf16 and fp32, a chunk of rows at a time."""

    name = "float8_cross_entropy"
    level = Level.AGGRESSIVE
    stage = Stage.MODULES
    # Before linear_cross_entropy and compile_loss, which then find the loss function taken: it wins more.
    turn = 8
    numerics = Numerics.PRECISION
    # Depends on emulation.
    features: tuple[str, ...] = ()
    # Asked for after the device: on a CPU plain PyTorch does it.
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """Two alternatives where the fused loss is proved to be the model's own."""
        if reason := _why_not(subject):
            return [Rejected(self.name, reason)]
        verdict = decide_head(subject.model, subject.calls)
        if not verdict:
            return [Rejected(self.name, verdict.reason)]
        section = subject.config.float8
        excluded = section.exclude if "exclude" in section.model_fields_set else ()
        if any(fnmatchcase(verdict.subject, pattern) for pattern in excluded):
            return [Rejected(self.name, f"{verdict.subject} is named in float8.exclude")]
        head: Any = subject.model.get_submodule(verdict.subject)
        if head.bias is not None:
            return [Rejected(self.name, "the head has a bias, which the FP8 form does not add")]
        return [
            Change(
                candidate=self.name, setting={"head": verdict.subject, "grad_weight": kind},
                reason=f"{verdict.reason}, in FP8, weight gradient in {kind}", fallback=kind != _GRAD_WEIGHTS[0],
            )
            for kind in _GRAD_WEIGHTS
        ]  # fmt: skip

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> tuple[Any, list[nn.Module]]:
        """Change head and loss function, in place. Raises ConfigError where they are not as they were planned."""
        float8 = {"grad_weight": setting["grad_weight"], "emulate": subject.config.float8.emulate}
        return join(subject.model, setting["head"], f"plan.{self.name}", float8=float8)

    def check(self, subject: Subject, run: Callable[[], Tensor]) -> Decision:
        """Loss and both gradients against high precision, on rows that the model gave its head."""
        owner, head = _joined(subject.model)
        rows = _recorded(head, run)
        if rows is None:
            return Rejected("fp8 head", "the head was not seen to run")
        least = gate(Numerics.PRECISION, subject.compute_dtype).layer_db
        assert least is not None
        figures = _figures(rows, head.weight, owner.loss_function.float8)
        where, worst = min(figures.items(), key=lambda item: (item[1] == item[1], item[1]))
        if not worst >= least:
            return Rejected("fp8 head", f"{where} of the head has {worst:.1f} dB, and {least:.1f} are needed")
        return Accepted("fp8 head", f"FP8 head {worst:.1f} dB and better ({where})")

    def undo(self, subject: Subject, applied: tuple[Any, list[nn.Module]]) -> None:
        """Restore both."""
        part(applied)


CANDIDATE = Float8CrossEntropy()


def _why_not(subject: Subject) -> str | None:
    if reason := why_no_float8(subject):
        return reason
    section = subject.config.float8.model_copy(update={"recipe": "tensorwise"})
    verdict = float8_available(section, subject.profile)
    return why_no_kernels(subject) if verdict else verdict.reason


def _joined(model: nn.Module) -> tuple[Any, Any]:
    """The module whose loss function is fused in FP8, and its head."""
    for module in model.modules():
        loss = vars(module).get(LOSS_SLOT)
        if isinstance(loss, FusedLoss) and loss.float8 is not None:
            owner: Any = module
            return owner, owner.get_output_embeddings()
    raise AssertionError("the change is in force while it is checked")


def _recorded(head: nn.Module, run: Callable[[], Tensor]) -> Tensor | None:
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().reshape(-1, args[0].shape[-1])
        seen.append(rows[:: max(1, len(rows) // ROWS)].clone())

    handle = head.register_forward_pre_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    return seen[0] if seen else None


def _figures(rows: Tensor, weight: Tensor, float8: Mapping[str, Any]) -> dict[str, float]:
    """SQNR of loss and gradients for labels drawn at random."""
    generator = torch.Generator(rows.device).manual_seed(0)
    labels = torch.randint(len(weight), (len(rows),), generator=generator, device=rows.device)
    found = []
    for exact in (True, False):
        dtype = torch.float32 if exact else rows.dtype
        hidden = rows.to(dtype).requires_grad_()
        own = (weight.detach().float() if exact else weight.detach()).requires_grad_()
        with torch.enable_grad(), torch.autocast(rows.device.type, enabled=False):
            if exact:
                loss = F.cross_entropy(F.linear(hidden, own), labels)
            else:
                loss = float8_linear_cross_entropy(hidden, own, labels, **float8)
            found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, own))))
    names = ("loss", "gradient of hidden states", "weight gradient")
    return {name: sqnr_db(one, other) for name, one, other in zip(names, *found, strict=True)}
