"""The loss after a short run, for changes that take bits away."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.optimize.apply import applied
from kpt_lightning.optimize.laboratory import Laboratory
from kpt_lightning.optimize.trial_record import TrialRecord
from kpt_lightning.optimize.work import resampled
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.loss_run import STEPS, judge_losses, losses_after, room_for_weights
from kpt_lightning.validation.state import preserved


class LossGate:
    """The loss after a short run against the unchanged model's, which is run once."""

    def __init__(self, laboratory: Laboratory) -> None:
        self._laboratory = laboratory
        self._plain: tuple[float, list[float]] | None = None

    def judged(self, record: TrialRecord, changes: Sequence[Change]) -> TrialRecord:
        """The record, not kept where the loss is worse."""
        subject = self._laboratory.subject
        if not (room := room_for_weights(subject.model)):
            return replace(record, kept=False, reason=f"its loss cannot be tried: {room.reason}")
        if self._plain is None:
            self._plain = self._start(), self._losses([])
        start, plain = self._plain
        spreads = gate(Numerics.PRECISION, subject.compute_dtype).loss_spreads
        assert spreads is not None
        verdict = judge_losses(plain, self._losses(changes), start, spreads)
        gates = f"{record.gate}; {verdict.reason}"
        if verdict:
            return replace(record, gate=gates)
        return replace(record, kept=False, gate=gates, reason=f"trains worse: {verdict.reason}")

    def _start(self) -> float:
        with preserved(self._laboratory.subject.model):
            return float(self._laboratory.work.loss().detach())

    def _losses(self, changes: Sequence[Change]) -> list[float]:
        laboratory = self._laboratory

        def step(seed: int, number: int) -> torch.Tensor:
            if number == STEPS:
                return laboratory.work.loss()
            with resampled(laboratory.work, 1000 * seed + number):
                return laboratory.work.loss()

        with applied(laboratory.subject, changes, laboratory.lookup):
            return losses_after(laboratory.subject.model, step, deadline=laboratory.deadline)
