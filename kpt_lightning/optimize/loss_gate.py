"""The loss after a short run, for changes that take bits away."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.optimize.laboratory import Laboratory
from kpt_lightning.optimize.optimizer_steps import set_rates, stepping, visible_rates, weights_of
from kpt_lightning.optimize.trial_record import TrialRecord
from kpt_lightning.optimize.work import resampled
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.loss_run import STEPS, judge_losses, losses_after, room_for_weights
from kpt_lightning.validation.state import preserved


class LossGate:
    """The loss after a short run against the unchanged model's, which is run once."""

    def __init__(self, laboratory: Laboratory) -> None:
        self._laboratory = laboratory
        self._plain: dict[bool, tuple[float, list[float]]] = {}

    def judged(self, record: TrialRecord, changes: Sequence[Change]) -> TrialRecord:
        """The record, not kept where the loss is worse."""
        subject = self._laboratory.subject
        if not (room := room_for_weights(weights_of(subject))):
            return record.refused(f"its loss cannot be tried: {room.reason}")
        steps = any(change.candidate in self._laboratory.stepped for change in changes)
        if steps not in self._plain:
            self._plain[steps] = self._start(), self._losses([], steps)
        start, plain = self._plain[steps]
        spreads = gate(Numerics.PRECISION, subject.compute_dtype).loss_spreads
        assert spreads is not None
        verdict = judge_losses(plain, self._losses(changes, steps), start, spreads)
        gates = f"{record.gate}; {verdict.reason}"
        if verdict:
            return replace(record, gate=gates)
        return replace(record, kept=False, gate=gates, reason=f"trains worse: {verdict.reason}")

    def _start(self) -> float:
        with preserved(self._laboratory.subject.model):
            return float(self._laboratory.work.loss().detach())

    def _losses(self, changes: Sequence[Change], steps: bool) -> list[float]:
        """With the optimizer's own steps where a change touches it, as a stochastic rounding is one of the step."""
        laboratory = self._laboratory
        subject = laboratory.subject
        rates = visible_rates(laboratory) if steps else []

        def step(seed: int, number: int) -> torch.Tensor:
            if number == STEPS:
                return laboratory.work.loss()
            with resampled(laboratory.work, 1000 * seed + number):
                return laboratory.work.loss()

        with ExitStack() as guard:
            optimizer = guard.enter_context(stepping(subject)) if steps else None
            if optimizer is not None:
                set_rates(optimizer, rates)
            guard.enter_context(laboratory.state(changes)())
            return losses_after(subject.model, step, deadline=laboratory.deadline, optimizer=optimizer)
