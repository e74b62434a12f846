"""Optimizer state in 8 or 4 bits, by torchao, in the user's own optimizer object."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.memory_shortage import NOT_SHORT, shortage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.candidates.torchao_adam import (
    STATE_CLASSES,
    Swapped,
    put_on,
    take_off,
    torchao_class,
    why_not_torchao,
)
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import TORCHAO, OptionalPackage
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.numerics import sqnr_db

# Bytes of one value, its code and its share of the fp32 scale of its block: torchao/optim/subclass_{8bit,fp8,4bit}.py.
_CODE_BYTES = {"8bit": 1.0, "fp8": 1.0, "4bit": 0.5}
# torchao/optim/adam.py, _AdamBase._new_buffer: smaller tensors, and those that blocks do not fill, stay as they are.
_SMALLEST = 4096
# The rest is lost where the allocator rounds.
_PROMISED = 0.95


class LowBitOptimizer:
    """Adam and AdamW with both moments in 8 bits, or FP8, or 4 bits; parameter groups and schedulers stay.

    State that is there is converted, and converted back by undo: moments then keep what storage in few bits left.
    """

    name = "low_bit_optimizer"
    level = Level.AGGRESSIVE
    stage = Stage.OPTIMIZER
    # Before fused kernels, which torchao's class does not have.
    turn = 65
    numerics = Numerics.PRECISION
    features: tuple[str, ...] = ("compile",)
    packages: tuple[OptionalPackage, ...] = (TORCHAO,)

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change for each storage that this device has, after steps of it were near enough to exact ones."""
        if reason := why_not_torchao(subject):
            return [Rejected(self.name, reason)]
        short = shortage(subject)
        if short is None:
            return [Rejected(self.name, NOT_SHORT)]
        if subject.device.type != "cuda":
            return [Rejected(self.name, f"state on {subject.device.type} takes none of a GPU's memory")]
        assert subject.optimizer is not None
        return [self._proposal(subject, storage, short) for storage in STATE_CLASSES]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> Swapped:
        """Put torchao's class on the optimizer."""
        if reason := why_not_torchao(subject):
            raise ConfigError("plan.low_bit_optimizer", setting["storage"], reason, "Make a new plan")
        assert subject.optimizer is not None
        return put_on(subject.optimizer, setting["storage"])

    def undo(self, subject: Subject, applied: Swapped) -> None:
        """Take it off."""
        take_off(applied)

    def _proposal(self, subject: Subject, storage: str, short: str) -> Change | Rejected:
        if storage == "fp8" and not (verdict := subject.profile.supports("fp8_tensorwise")):
            return Rejected(self.name, f"{storage}: {verdict.reason}")
        optimizer = subject.optimizer
        assert optimizer is not None
        saves = saved_state_bytes(optimizer, storage)
        if saves <= 0:
            return Rejected(self.name, f"{storage}: no parameter is large enough for blocks")
        found, needed = update_db(storage, subject.device), gate(self.numerics, torch.float32).median_gradient_db
        if not found >= needed:
            return Rejected(self.name, f"{storage}: updates have {found:.1f} dB, and {needed} are needed")
        reason = f"{short}; moments in {storage}, updates of five steps within {found:.0f} dB"
        return Change(candidate=self.name, setting={"storage": storage}, reason=reason, saves_bytes=saves)


CANDIDATE = LowBitOptimizer()


def saved_state_bytes(optimizer: Optimizer, storage: str) -> int:
    """What storage in few bits saves of the state of all parameters that are trained."""
    block = torchao_class(storage)[1]
    saved = 0.0
    for group in optimizer.param_groups:
        moments = 3 if group["amsgrad"] else 2
        for each in group["params"]:
            if each.requires_grad and each.numel() >= _SMALLEST and each.numel() % block == 0:
                saved += moments * each.numel() * (each.element_size() - _CODE_BYTES[storage] - 4 / block)
    return int(_PROMISED * saved)


def update_db(storage: str, device: torch.device) -> float:
    """SQNR in dB of what five steps add to a weight, against AdamW in float64."""
    random = torch.Generator().manual_seed(0)
    start, *gradients = [torch.randn(64, 128, generator=random, dtype=torch.float64) for _ in range(6)]
    exact, stored = nn.Parameter(start.clone()), nn.Parameter(start.to(device, torch.float32))
    reference, optimizer = AdamW([exact], lr=0.01), AdamW([stored], lr=0.01)
    put_on(optimizer, storage)
    for gradient in gradients:
        exact.grad, stored.grad = gradient, gradient.to(device, torch.float32)
        reference.step()
        optimizer.step()
    return sqnr_db(exact.detach() - start, stored.detach().cpu().double() - start)
