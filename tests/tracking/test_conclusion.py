"""A run that just ended is judged by the gate, and by what no number tells."""

import dataclasses
import random
from datetime import UTC, datetime, timedelta

import pytest

from kpt_lightning.tracking.acks import new_ack
from kpt_lightning.tracking.broken import FINITE_LOSS
from kpt_lightning.tracking.conclusion import conclude
from kpt_lightning.tracking.events import utc_now
from kpt_lightning.tracking.record import Metric, RunKey, RunRecord
from kpt_lightning.tracking.recorder import OUT_OF_MEMORY

KEY = RunKey(name="m", model="a", config="b", device="cpu", device_count=1, strategy="s", precision="32-true")
ENVIRONMENT = {"torch": "2.13", "host": "h", "git_commit": "c1"}
STEADY = (0.1000, 0.1010, 0.0990, 0.1005, 0.0995, 0.1000, 0.1010, 0.0990)


def run(step_time=0.1, *, run_id="r", n=200, environment=ENVIRONMENT, status="finished", details=(), **values):
    metrics = {
        "step_time": Metric(median=step_time, unit="s", better="lower", n=n),
        "samples_per_second": Metric(median=4 / step_time, unit="samples/s", better="higher", n=n),
    }
    metrics |= {name: Metric(median=value, unit="s", better="lower") for name, value in values.items()}
    return RunRecord(
        run_id=run_id, created_at="2026-01-01", key=KEY, status=status, metrics=metrics, environment=environment,
        loss_finite=True, details={"first_step": 1, **dict(details)},
    )  # fmt: skip


def history(times=STEADY, **options):
    return [run(time, run_id=f"h{index}", **options) for index, time in enumerate(times)]


def outcomes(found):
    return {each.metric: each.verdict.outcome for each in found.verdicts if each.verdict}


@pytest.mark.parametrize(
    ("now", "outcome", "severity"),
    [
        (0.1, "pass", None),
        (0.112, "regression", "moderate"),
        (0.13, "regression", "severe"),
        (0.08, "improvement", None),
    ],
)
def test_the_gate_judges_and_names_the_severity(now, outcome, severity):
    found = conclude(run(now), history())
    assert outcomes(found) == {"step_time": outcome, "samples_per_second": outcome}
    assert (found.severity, found.regressed) == (severity, severity is not None)


def test_a_slower_step_and_its_throughput_are_one_regression():
    (clause,) = conclude(run(0.13), history()).regressions
    assert clause.startswith("severe: step_time +30.0% (+")
    assert "and with it samples_per_second -23" in clause


@pytest.mark.parametrize(("fail_on", "counted"), [("minor", True), ("moderate", True), ("severe", False)])
def test_only_what_reaches_fail_on_counts(fail_on, counted):
    found = conclude(run(0.112), history(), fail_on=fail_on)
    assert found.severity == "moderate"
    assert found.regressed == counted


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_runs_give_an_estimate_and_never_an_alarm(count):
    found = conclude(run(0.2), history()[:count] if count > 1 else history([0.1]))
    assert found.earlier == count
    assert found.verdicts[0].verdict.shift == pytest.approx(1.0, rel=0.02)
    assert not found.verdicts[0].judged
    assert not found.regressed


def test_without_a_finished_run_before_there_is_nothing_to_say():
    assert conclude(run(), []) is None
    assert conclude(run(), [run(status="failed")]) is None


def test_runs_of_another_environment_are_named_and_not_compared_with():
    newer = {**ENVIRONMENT, "torch": "2.14", "git_commit": "c2"}
    found = conclude(run(0.2, environment=newer), history())
    assert not found.regressed
    assert found.verdicts[0].verdict is None
    assert "torch 2.13 -> 2.14" in found.verdicts[0].note
    assert found.changes["environment.torch"] == ("2.13", "2.14")
    assert found.changes["environment.git_commit"] == ("c1", "c2")


def test_short_runs_are_neither_judged_nor_compared_with():
    assert conclude(run(0.2, n=5), history()).verdicts == ()
    found = conclude(run(0.1), [*history(), *history([0.5] * 8, n=5)])
    assert outcomes(found)["step_time"] == "pass"


@pytest.mark.parametrize(("wait", "regressed"), [(0.0004, False), (0.03, True)])
def test_a_longer_wait_counts_where_it_takes_a_part_of_the_step(wait, regressed):
    before = [dataclasses.replace(each) for each in history(data_wait=0.0001)]
    found = conclude(run(data_wait=wait), before)
    assert outcomes(found)["data_wait"] == ("regression" if regressed else "pass")
    assert found.regressed == regressed


def test_a_loss_stands_run_after_run_until_somebody_accepts_it():
    slow = [run(0.112, run_id=f"slow{n}") for n in range(6)]
    for count in range(6):
        assert conclude(slow[count], [*history(), *slow[:count]]).regressed
    assert not conclude(slow[5], [*history(), *slow[:5]], accepted={each.run_id for each in slow[:5]}).regressed


def test_an_acknowledged_regression_is_no_news():
    first = conclude(run(0.112, run_id="n"), history())
    acks = [
        new_ack(
            key_digest=KEY.digest,
            run_name="m",
            metric=each.metric,
            severity="moderate",
            shift=each.verdict.shift,
            base_runs=each.base_runs,
            reason="known",
            expires=datetime(2999, 1, 1, tzinfo=UTC),
        )
        for each in first.verdicts
    ]
    again = conclude(run(0.112, run_id="n"), history(), acks=acks)
    assert outcomes(again) == outcomes(first)
    assert not again.regressed
    assert again.severity is None


def test_a_loss_that_is_not_finite_any_more_is_severe_and_one_that_never_was_is_no_news():
    bad = dataclasses.replace(run(), loss_finite=False)
    assert conclude(bad, [run()]).regressions == ("severe: a loss is not finite any more",)
    assert conclude(bad, [run()]).severity == "severe"
    assert not conclude(bad, [bad]).regressed


def test_what_broke_counts_as_kpt_regress_check_counts_it():
    bad = dataclasses.replace(run(run_id="bad"), loss_finite=False)
    assert conclude(dataclasses.replace(bad, run_id="again"), [run(), bad]).severity == "severe"
    known = new_ack(
        key_digest=bad.key.digest, run_name="n", metric=FINITE_LOSS, severity="severe", shift=-1.0, base_runs=[],
        reason="known", expires=utc_now() + timedelta(days=1),
    )  # fmt: skip
    assert not conclude(bad, [run()], acks=[known]).regressed


def test_a_run_that_died_without_memory_is_severe_whatever_its_times():
    dead = run(status="failed", details={"cause": OUT_OF_MEMORY})
    found = conclude(dead, history())
    assert found.verdicts == ()
    assert found.severity == "severe"
    assert "out of memory" in found.regressions[0]


def test_unchanged_runs_are_rarely_called_worse():
    rng, alarms = random.Random(0), 0
    for _ in range(300):
        times = [0.1 * rng.lognormvariate(0, 0.013) for _ in range(9)]
        alarms += conclude(run(times[-1]), history(times[:-1])).regressed
    assert alarms / 300 <= 0.02
