"""What a trial showed, as strict JSON."""

import json
import math

import pytest

from kpt_lightning.measure.interleave import gain_of
from kpt_lightning.optimize.trial_record import TrialRecord


@pytest.mark.parametrize("rounds", [1, 4, 11])
def test_a_record_is_strict_json_however_few_rounds_there_were(rounds: int) -> None:
    ratios = [0.1 + 0.001 * number for number in range(rounds)]
    gain = gain_of(ratios, ([0.2] * rounds, [0.18] * rounds))
    record = TrialRecord(candidate="x").forecast(gain)
    text = json.dumps(record.to_dict(), allow_nan=False)
    assert TrialRecord.from_dict(json.loads(text)) == record
    assert record.gain == gain.ratio
    assert (record.low is None) == (rounds < 6)
    if record.low is not None:
        assert math.isfinite(record.low)
        assert (record.low, record.high) == (gain.low, gain.high)
