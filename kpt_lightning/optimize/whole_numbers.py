"""The numbers of all kept changes together, each part by the limits of its own kind."""

from collections.abc import Sequence
from dataclasses import replace

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.decision import Accepted, Decision
from kpt_lightning.optimize.baseline import Baseline, take_baseline
from kpt_lightning.optimize.fewer_bits import of_fewer_bits
from kpt_lightning.optimize.laboratory import Laboratory
from kpt_lightning.optimize.trial import compare
from kpt_lightning.validation.gates import Numerics


def compare_whole(laboratory: Laboratory, changes: Sequence[Change], plain: Baseline) -> Decision:
    """With changes to fewer bits all of them against the unchanged model; the rest also without layers in FP8.

    A fault in what only rounds is far below what fewer bits may do, so one comparison would not show it.
    """
    fewer, rest = of_fewer_bits(changes, laboratory.lookup)
    verdict: Decision = Accepted("gate", "no change of the model's numbers")
    if fewer:
        verdict = compare(laboratory, [*fewer, *rest], Numerics.PRECISION, plain)
    if not verdict or not rest:
        return verdict
    base = plain
    if steady := laboratory.steady(fewer):
        with laboratory.state(steady)():
            base = take_baseline(laboratory.subject, laboratory.work.loss_and_outputs)
    kinds = [laboratory.lookup(change.candidate).numerics for change in rest]
    beside = compare(laboratory, [*steady, *rest], max(kinds, key=list(Numerics).index), base)
    return replace(beside, reason=f"{verdict.reason}; beside them {beside.reason}") if fewer else beside
