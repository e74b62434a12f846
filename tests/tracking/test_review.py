"""A history judged again and again: acknowledgements hold while they should, and their ends are remembered."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kpt_lightning.tracking.acks import acknowledge, all_acks, new_ack
from kpt_lightning.tracking.baselines import new_baseline, pin
from kpt_lightning.tracking.check import Checked
from kpt_lightning.tracking.review import review
from kpt_lightning.tracking.store import RunStore
from tests.tracking.test_check import STEADY, runs

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


class History:
    """Runs of one key and metric, one after the other."""

    def __init__(self, place: "Path | str") -> None:
        self.store = RunStore(place)

    def add(self, values: Sequence[float], **changes: object) -> "History":
        for record in runs(list(values), start=len(self.store.ids()), **changes):
            self.store.add(record)
        return self

    def judge(self, new: int = 1, now: datetime = NOW, baseline: str | None = None) -> Checked:
        (found,) = review(self.store, new=new, now=now, baseline=baseline).found
        return found

    def acknowledge(self, days: int = 14) -> None:
        seen = self.judge()
        assert seen.regressed
        assert seen.verdict is not None
        ack = new_ack(
            key_digest=seen.key.digest, run_name="m", metric=seen.metric, severity=seen.verdict.severity,
            shift=seen.verdict.shift, base_runs=seen.base_runs, reason="known", expires=NOW + timedelta(days=days),
        )  # fmt: skip
        acknowledge(self.store, [ack])

    @property
    def states(self) -> list[str]:
        return [ack.state(NOW) for ack in all_acks(self.store)]


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "runs.sqlite").add(STEADY)


def test_a_known_regression_passes_while_it_stays_as_it_was(history: History) -> None:
    pin(history.store, [new_baseline("main", history.store.all())])
    history.add([0.111]).acknowledge()
    for value in (0.111, 0.110, 0.112):
        seen = history.add([value]).judge(baseline="main")
        assert seen.regressed
        assert seen.acknowledged is not None
    assert history.states == ["live"]


def test_it_fails_again_from_the_moment_of_expiry_on(history: History) -> None:
    history.add([0.111]).acknowledge(days=14)
    assert history.judge(now=NOW + timedelta(days=14, seconds=-1)).acknowledged is not None
    late = history.judge(now=NOW + timedelta(days=14))
    assert late.regressed
    assert late.acknowledged is None
    assert history.states == ["live"]


def test_recovery_ends_it_for_good(history: History) -> None:
    pin(history.store, [new_baseline("main", history.store.all())])
    history.add([0.111]).acknowledge()
    seen = history.add([0.100]).judge()
    assert seen.ended is not None
    assert history.states == ["recovered"]
    (ack,) = all_acks(history.store)
    assert ack.end is not None
    assert (ack.end.run_id, ack.end.created_at) == ("11", NOW.isoformat(timespec="milliseconds"))
    again = history.add([0.111]).judge(baseline="main")
    assert (again.regressed, again.acknowledged) == (True, None)


def test_another_severity_ends_it_and_fails_at_once(history: History) -> None:
    history.add([0.111]).acknowledge()
    seen = history.add([0.130]).judge()
    assert (seen.regressed, seen.acknowledged) == (True, None)
    assert history.states == ["worsened"]
    # Back to what was known before, it fails too: whoever wants it acknowledges it anew.
    assert history.add([0.111]).judge().acknowledged is None


def test_a_slow_level_that_became_the_usual_one_is_no_recovery(history: History) -> None:
    history.add([0.111]).acknowledge()
    seen = history.add([0.111, 0.112, 0.110, 0.111, 0.1115, 0.1105, 0.111, 0.112, 0.110, 0.111]).judge()
    assert (seen.regressed, seen.acknowledged is not None, seen.since) == (True, True, "10")
    assert history.states == ["live"]
    # And a second loss on top of it is not covered by the first one's acknowledgement.
    seen = history.add([0.1155]).judge()
    assert (seen.regressed, seen.acknowledged) == (True, None)
    assert "worse than what was acknowledged" in seen.note
    assert history.states == ["live"]
    assert history.add([0.130]).judge().acknowledged is None
    assert history.states == ["worsened"]


@pytest.mark.parametrize(("known", "newest"), [(0.111, 0.1033), (0.104, 0.1025)])
def test_a_run_that_leaves_the_known_loss_possible_ends_nothing(history: History, known: float, newest: float) -> None:
    history.add([known]).acknowledge()
    assert not history.add([newest]).judge().regressed
    assert history.states == ["live"]


def test_a_pinned_baseline_is_judged_by_although_a_slower_level_was_accepted_later(history: History) -> None:
    pin(history.store, [new_baseline("main", history.store.all())])
    history.add([0.111, 0.112, 0.110, 0.111, 0.1115, 0.1105, 0.111, 0.112, 0.110, 0.111])
    pin(history.store, [new_baseline("slow", history.store.all()[-10:])])
    assert not history.judge().regressed
    seen = history.judge(baseline="main")
    assert seen.regressed
    assert (seen.baseline, seen.base_runs, seen.new_runs) == ("main", tuple(map(str, range(10))), ("19",))


def test_a_key_without_a_pin_has_no_verdict_and_says_what_to_do(history: History) -> None:
    seen = history.judge(baseline="release")
    assert (seen.verdict, seen.judged) == (None, False)
    assert "kpt regress accept --name release" in seen.note


def test_a_run_that_is_pinned_itself_passes_and_that_is_told(history: History) -> None:
    pin(history.store, [new_baseline("main", history.store.all())])
    seen = history.judge(baseline="main")
    assert seen.judged
    assert not seen.regressed
    assert seen.note == "1 of the 1 newest runs are pinned as 'main' themselves"


def test_pinned_runs_of_another_environment_are_left_out_and_told(history: History) -> None:
    pin(history.store, [new_baseline("main", history.store.all())])
    seen = history.add([0.12], environment={"torch": "3"}).judge(baseline="main")
    assert seen.verdict is None
    assert seen.note == "only runs since the environment changed are compared with: torch 2 -> 3"


def test_on_a_server_all_of_it_holds_too(postgres: str) -> None:
    history = History(postgres)
    history.add(STEADY).add([0.111]).acknowledge()
    pin(history.store, [new_baseline("main", history.store.all()[:10])])
    assert history.judge(baseline="main").acknowledged is not None
    assert history.add([0.100]).judge(baseline="main").ended is not None
    assert history.states == ["recovered"]
