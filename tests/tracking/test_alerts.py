"""Metrics that fall together are one alert, and one that fails a build speaks for it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from kpt_lightning.tracking.acks import new_ack
from kpt_lightning.tracking.alerts import Alert, group_alerts, group_of
from kpt_lightning.tracking.check import check_runs
from kpt_lightning.tracking.measured import KNOWN
from kpt_lightning.tracking.record import Metric, RunRecord
from tests.tracking.test_check import STEADY
from tests.tracking.test_store import KEY, make

LEVELS = {"step_time": 0.1, "tokens_per_second": 1e4, "mfu": 0.4, "peak_memory": 2e9, "final_loss": 2.0}


def histories(*levels: Mapping[str, float]) -> list[RunRecord]:
    """One run for each entry: name -> factor on the usual level, 1 where it is left out."""
    made = []
    for number, factors in enumerate(levels):
        jitter = STEADY[number % len(STEADY)] / 0.1
        metrics = {
            name: Metric(median=level * jitter * factors.get(name, 1.0), unit=KNOWN[name][0], better=KNOWN[name][1])
            for name, level in LEVELS.items()
        }
        made.append(replace(make(str(number)), metrics=metrics))
    return made


def alerts_of(records: Sequence[RunRecord], **options: object) -> list[Alert]:
    return group_alerts(check_runs(records, **options), records)  # type: ignore[arg-type]


STEADILY: list[Mapping[str, float]] = [{}] * 20
SLOWER = {"step_time": 1.3, "tokens_per_second": 1 / 1.3, "mfu": 1 / 1.3}


def test_a_slower_step_and_fewer_tokens_are_one_alert_led_by_the_step() -> None:
    (alert,) = alerts_of(histories(*STEADILY, SLOWER))
    assert (alert.group, alert.severity, alert.leading.metric) == ("time", "severe", "step_time")
    assert [each.metric for each in alert.consequences] == ["tokens_per_second", "mfu"]
    assert not alert.acknowledged
    assert (alert.since, alert.change) == (None, None)


def test_time_memory_and_loss_are_alerts_of_their_own_the_worst_first() -> None:
    found = alerts_of(histories(*STEADILY, SLOWER | {"peak_memory": 1.1, "final_loss": 1.5}))
    assert [(each.group, each.severity) for each in found] == [
        ("time", "severe"), ("loss", "severe"), ("memory", "moderate"),
    ]  # fmt: skip


def test_the_worst_metric_leads_although_it_is_no_cause() -> None:
    (alert,) = alerts_of(histories(*STEADILY, {"step_time": 1.06, "tokens_per_second": 0.5}))
    assert (alert.leading.metric, alert.severity) == ("tokens_per_second", "severe")


def test_since_when_comes_from_the_history() -> None:
    records = histories(*STEADILY, *[SLOWER] * 4)
    (alert,) = alerts_of(records, new=4)
    assert alert.since == records[20]
    assert alert.change is not None
    assert alert.change.index == 20


def test_an_improvement_is_never_since_when_it_got_worse() -> None:
    faster = {"step_time": 0.8}
    (alert,) = alerts_of(histories(*STEADILY, *[faster] * 10, {}))
    assert (alert.leading.metric, alert.since, alert.change) == ("step_time", None, None)


def test_metrics_that_changed_at_different_times_are_different_alerts() -> None:
    records = histories(*STEADILY, *[{"step_time": 1.3}] * 6, *[{"step_time": 1.3, "mfu": 0.7}] * 5)
    found = alerts_of(records, new=11)
    assert {each.leading.metric: each.since and each.since.run_id for each in found} == {"step_time": "20", "mfu": "26"}


def test_an_alert_is_known_when_every_metric_of_it_is() -> None:
    records = histories(*STEADILY, SLOWER)
    now = datetime(2026, 6, 1, tzinfo=UTC)

    def ack(metric: str) -> object:
        return new_ack(
            key_digest=KEY.digest, run_name="m", metric=metric, severity="severe", shift=0.3,
            base_runs=[str(number) for number in range(20)], reason="known", expires=now + timedelta(days=1),
        )  # fmt: skip

    (alert,) = alerts_of(records, acks=[ack("step_time")], now=now)
    assert (alert.acknowledged, alert.leading.metric) == (False, "tokens_per_second")
    (alert,) = alerts_of(records, acks=[ack(name) for name in SLOWER], now=now)
    assert (alert.acknowledged, alert.leading.metric) == (True, "step_time")


def test_keys_never_share_an_alert() -> None:
    records = histories(*STEADILY, SLOWER)
    other = [replace(each, run_id=f"o{each.run_id}", key=replace(KEY, precision="fp8")) for each in records]
    assert {each.key.precision for each in alerts_of([*records, *other])} == {"32-true", "fp8"}


@pytest.mark.parametrize(
    ("metric", "unit", "group"),
    [
        ("step_time", "s", "time"), ("tokens_per_second", "tokens/s", "time"), ("mfu", "1", "time"),
        ("time", "s", "time"), ("images", "images/s", "time"), ("reserved_memory", "bytes", "memory"),
        ("final_loss", "1", "loss"), ("val_loss", "1", "loss"), ("accuracy", "1", "accuracy"),
    ],
)  # fmt: skip
def test_the_unit_tells_the_group_of_a_metric_that_is_not_known(metric: str, unit: str, group: str) -> None:
    assert group_of(metric, unit) == group
