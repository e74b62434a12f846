"""The whole is measured again while its forecast does not exclude that it is slower, and judged by all rounds."""

import math
from typing import Any

import pytest

from kpt_lightning.measure.interleave import Gain, gain_of
from kpt_lightning.optimize import whole
from tests.optimize.faults import Made, Tiny, faster
from tests.optimize.searched import NAP, run


def gain(*speeds: float, earlier: Gain | None = None) -> Gain:
    ratios = [*(() if earlier is None else earlier.ratios), *map(math.log, speeds)]
    return gain_of(ratios, ([1.0] * len(ratios), [math.exp(-each) for each in ratios]))


SURE, FLIPPED = (1.5, 1.48, 1.52, 1.5, 1.51, 1.49), (0.8, 0.81, 0.79, 0.8, 0.82, 0.8)
NOISY = (1.5, 1.1, 2.0, 1.05, 1.6, 1.2)


@pytest.mark.parametrize(
    ("rounds", "measured", "kept"),
    [
        ([SURE], 1, True),
        ([FLIPPED], 1, False),
        # Fast within one measurement alone, and slow in those that come later.
        ([NOISY, FLIPPED, FLIPPED], 2, False),
        ([NOISY, SURE], 2, True),
        ([NOISY, NOISY, NOISY], 3, True),
    ],
)
def test_noise_is_met_with_more_rounds(
    monkeypatch: pytest.MonkeyPatch, rounds: list[tuple[float, ...]], measured: int, kept: bool
) -> None:
    told = iter(rounds)
    given: list[Gain | None] = []

    def measure(*states: Any, earlier: Gain | None = None, **options: Any) -> Gain:
        given.append(earlier)
        return gain(*next(told), earlier=earlier)

    monkeypatch.setattr(whole, "measure_gain", measure)
    outcome = run(Tiny(nap=NAP), Made("honest", lambda model: faster(model, NAP / 2)))
    assert outcome.whole is not None
    assert len(given) == measured
    assert [None if each is None else each.rounds for each in given] == [None, 6, 12][:measured]
    assert outcome.whole.kept is kept
    assert bool(outcome.changes) is kept
