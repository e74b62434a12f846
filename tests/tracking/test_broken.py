"""A diverged or dead run is a severe regression, although it left no number that got worse."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kpt_lightning.tracking.acks import Ack, new_ack
from kpt_lightning.tracking.broken import ENOUGH_MEMORY, FINITE_LOSS, broken_runs
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.recorder import OUT_OF_MEMORY
from kpt_lightning.tracking.review import review
from kpt_lightning.tracking.store import RunStore
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_store import KEY, make

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DIVERGED = replace(make("nan"), loss_finite=False)
DEAD = replace(make("oom", status="failed"), loss_finite=None, details={"cause": OUT_OF_MEMORY})


def ack_of(metric: str) -> Ack:
    return new_ack(
        key_digest=KEY.digest, run_name="m", metric=metric, severity="severe", shift=-1.0, base_runs=[],
        reason="known", expires=NOW + timedelta(days=1),
    )  # fmt: skip


@pytest.mark.parametrize(("newest", "name"), [(DIVERGED, FINITE_LOSS), (DEAD, ENOUGH_MEMORY)])
def test_it_is_severe_where_earlier_runs_were_well(newest: RunRecord, name: str) -> None:
    (found,) = broken_runs([*runs(STEADY), newest], now=NOW)
    assert found.verdict is not None
    assert (found.metric, found.regressed, found.judged, found.verdict.severity) == (name, True, True, "severe")
    assert (found.before, found.now, found.new_runs) == (1.0, 0.0, (newest.run_id,))
    assert broken_runs([*runs(STEADY), newest], now=NOW, metrics=["step_time"]) == []


@pytest.mark.parametrize(
    "history",
    [
        [], [DIVERGED], [DEAD], runs(STEADY), [*runs(STEADY), DIVERGED, make("well")],
        [*runs(STEADY), DEAD, make("well")], [*runs(STEADY), make("killed", status="failed")],
        [*runs(STEADY, key=replace(KEY, precision="fp8")), DIVERGED], [*runs(STEADY, key=replace(KEY, name="x")), DEAD],
    ],
)  # fmt: skip
def test_nothing_is_said_where_all_is_well_again_or_never_was(history: list[RunRecord]) -> None:
    assert broken_runs(history, now=NOW) == []


def test_an_acknowledgement_covers_it_and_ends_when_it_is_well() -> None:
    (found,) = broken_runs([*runs(STEADY), DIVERGED], now=NOW, acks=[ack_of(FINITE_LOSS)])
    assert (found.regressed, found.acknowledged is not None, found.ended) == (True, True, None)
    (found,) = broken_runs([*runs(STEADY), DIVERGED, make("well")], now=NOW, acks=[ack_of(FINITE_LOSS)])
    assert (found.regressed, found.acknowledged) == (False, None)
    assert found.ended is not None
    assert found.ended[1].kind == "recovered"


def test_a_review_of_the_history_alerts_to_it(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs.sqlite")
    for record in [*runs(STEADY), DIVERGED]:
        store.add(record)
    (alert,) = review(store).alerts
    assert (alert.group, alert.severity, alert.leading.metric) == ("loss", "severe", FINITE_LOSS)
