"""What needs no look shares a line, what is common to a key is said once, and nothing is lost."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from kpt_lightning.reports.findings import Finding
from kpt_lightning.reports.folding import KeyFindings, by_key, folded
from kpt_lightning.tracking.acks import new_ack
from kpt_lightning.tracking.record import RunRecord
from tests.reports.demo_history import demo_history
from tests.reports.test_findings import told
from tests.tracking.test_alerts import SLOWER, STEADILY, histories
from tests.tracking.test_check import STEADY, runs
from tests.tracking.test_store import KEY

METRICS = ["step time", "tokens/s", "MFU", "peak memory", "final loss"]


def of(*lines: dict[str, float], name: str = "m", **changes: object) -> list[RunRecord]:
    return [replace(run, key=replace(run.key, name=name), **changes) for run in histories(*lines)]


def one(found: list[Finding], **options: bool) -> KeyFindings:
    (key,) = by_key(found, **options)
    return key


def everything_of(key: KeyFindings) -> str:
    rows = [" ".join((each.metric, each.verdict)) for each in key.shown]
    return "\n".join((key.title, *rows, *(fold.text for fold in key.folds), *key.notes))


def test_passes_share_one_line_with_their_number_and_reason() -> None:
    key = one(told(of(*STEADILY, SLOWER)))
    assert [each.metric for each in key.shown] == METRICS[:3]
    assert [fold.text for fold in key.folds] == ["2 pass (a loss of 5.0% is excluded): peak memory, final loss"]
    assert one(told(of(*STEADILY, SLOWER)), fold=False).folds == ()


def test_a_single_pass_is_a_row_with_its_numbers() -> None:
    key = one(told(runs([*STEADY, 0.1])))
    assert [each.now for each in key.shown] == ["100.000 ms"]
    assert key.folds == ()


@pytest.mark.parametrize(("last", "state"), [(0.05, "improved"), (0.104, "unsettled")])
def test_improvements_and_what_noise_leaves_open_have_rows_of_their_own(last: float, state: str) -> None:
    records = [
        replace(run, metrics=dict.fromkeys(("one", "other"), run.metrics["step_time"]))
        for run in runs([*[0.095, 0.105, 0.1, 0.108, 0.092] * 4, last])
    ]
    shown, folds = folded(told(records))
    assert [(each.metric, each.state) for each in shown] == [("one", state), ("other", state)]
    assert folds == []


@pytest.mark.parametrize(
    ("count", "text"), [(1, "5 no baseline (no run to compare with): "), (3, "5 inconclusive (2 runs before; at least")]
)
def test_a_key_without_enough_runs_is_one_line(count: int, text: str) -> None:
    (fold,) = one(told(of(*STEADILY[:count]))).folds
    assert fold.text.startswith(text)
    assert list(fold.metrics) == METRICS


def test_keys_with_regressions_come_first() -> None:
    found = told([*of(*STEADILY, {}, name="steady"), *of(*STEADILY, SLOWER, name="slower")])
    assert [key.title.partition(":")[0] for key in by_key(found)] == ["slower", "steady"]


@pytest.mark.parametrize("fold", [True, False])
def test_what_holds_for_all_metrics_of_a_key_is_said_once_and_names_none(fold: bool) -> None:
    history = of(*STEADILY, environment={"torch": "1"})
    newer = of(*STEADILY, SLOWER, environment={"torch": "2"})
    found = told([*history, *(replace(run, run_id=f"new-{run.run_id}") for run in newer)])
    key = one(found, fold=fold)
    note = "only runs since the environment changed are compared with: torch 1 -> 2"
    assert note in key.notes
    assert everything_of(key).count("torch 1 -> 2") == 1
    (worse,) = (line for line in key.notes if line.startswith("step time, tokens/s, MFU: since run "))
    assert "beyond the noise of" in worse


def test_a_note_about_a_folded_metric_is_kept() -> None:
    now = datetime(2026, 6, 1, tzinfo=UTC)
    history = of(*STEADILY, {})
    ack = new_ack(
        key_digest=history[0].key.digest, run_name="m", metric="peak_memory", severity="moderate", shift=0.1,
        base_runs=[run.run_id for run in history[:10]], reason="waits", expires=now + timedelta(days=3),
    )  # fmt: skip
    key = one(told(history, acks=[ack], now=now))
    assert key.notes == ("peak memory: the acknowledgement (waits) ended: recovered",)


def test_a_lost_metric_is_a_row_and_does_not_hide_what_is_common() -> None:
    history = of(*STEADILY, {}, environment={"torch": "2"})
    history[0] = replace(history[0], environment={"torch": "1"})
    newest = {name: metric for name, metric in history[-1].metrics.items() if name != "mfu"}
    key = one(told([*history[:-1], replace(history[-1], metrics=newest)]))
    assert [(each.metric, each.verdict) for each in key.shown] == [("MFU", "missing")]
    assert "only runs since the environment changed are compared with: torch 1 -> 2" in key.notes
    assert any(line.startswith("MFU: the newest run does not have it") for line in key.notes)


@pytest.mark.parametrize("fold", [True, False])
def test_nothing_that_was_found_is_left_out(fold: bool) -> None:
    found = told(demo_history(), accepted=())
    text = "\n".join(map(everything_of, by_key(found, fold=fold)))
    for each in found:
        assert each.metric in text
        assert all(note in text for note in (each.since, *each.reasons))
    keys = by_key(found, fold=fold)
    assert sum(len(key.shown) + sum(len(each.metrics) for each in key.folds) for key in keys) == len(found)


def test_keys_of_one_name_are_told_apart() -> None:
    other = [replace(run, run_id=f"o{run.run_id}", key=replace(KEY, config="c")) for run in runs([*STEADY, 0.1])]
    assert len({key.digest for key in by_key(told([*runs([*STEADY, 0.1]), *other]))}) == 2
