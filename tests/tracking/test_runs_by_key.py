"""What a command means by a key, a name or its runs, and what it refuses."""

from dataclasses import replace

import pytest

from kpt_lightning.errors import ConfigError
from kpt_lightning.tracking.check import finished_by_key
from kpt_lightning.tracking.runs_by_key import choose_keys, one_key, runs_to_pin
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_store import KEY, make

OTHER = replace(KEY, precision="fp8")
HISTORY = [*runs(STEADY), *runs(STEADY, start=50, key=OTHER), *runs([0.1], start=90, key=replace(KEY, name="lone"))]
BY_KEY = finished_by_key(HISTORY)


def test_a_key_is_meant_by_the_beginning_of_its_digest_or_its_name() -> None:
    assert choose_keys(BY_KEY) == BY_KEY
    assert list(choose_keys(BY_KEY, key=OTHER.digest[:6])) == [OTHER.digest]
    assert list(choose_keys(BY_KEY, name="m")) == [KEY.digest, OTHER.digest]
    assert one_key(HISTORY, name="lone") == replace(KEY, name="lone").digest
    assert one_key(HISTORY, key=KEY.digest) == KEY.digest


@pytest.mark.parametrize(
    ("key", "name", "says"),
    [("zz", None, "--key"), ("", None, "3 keys"), (None, "nobody", "lone, m"), (None, "m", "must mean one key"),
     (None, None, "must mean one key")],
)  # fmt: skip
def test_what_means_no_key_or_several_is_refused(key: str | None, name: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        one_key(HISTORY, key=key, name=name)


def test_the_newest_runs_of_the_newest_environment_are_pinned_and_short_keys_are_told() -> None:
    history = [
        *runs([9.0] * 8, environment={"torch": "1"}),
        *runs(STEADY, start=50),
        *runs([0.1] * 4, start=90, key=OTHER),
    ]
    chosen, left_out = runs_to_pin(finished_by_key(history), [], 7)
    assert [run.run_id for run in chosen[KEY.digest]] == [str(number) for number in range(53, 60)]
    assert list(chosen) == [KEY.digest]
    assert len(left_out) == 1
    assert "4 runs in one environment; a baseline needs 5" in left_out[0]


def test_runs_that_are_asked_for_are_pinned_in_their_order() -> None:
    chosen, left_out = runs_to_pin(BY_KEY, list(reversed(HISTORY[2:8])), 10)
    assert [run.run_id for run in chosen[KEY.digest]] == ["2", "3", "4", "5", "6", "7"]
    assert left_out == []
    with pytest.raises(ConfigError, match="is failed"):
        runs_to_pin(BY_KEY, [make("x", status="failed")], 10)
