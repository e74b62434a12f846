import dataclasses

import pytest
from rich.console import Console

from kpt_lightning.tracking import report
from kpt_lightning.tracking.conclusion import conclude
from kpt_lightning.tracking.record import Metric, RunKey, RunRecord

KEY = RunKey(name="Net", model="a", config="b", device="GPU", device_count=2, strategy="DDP", precision="bf16-mixed")
METRICS = {
    "step_time": Metric(median=0.25, unit="s", better="lower", n=90, n_effective=90.0, mad=0.002),
    "tokens_per_second": Metric(median=123456.0, unit="tokens/s", better="higher", n=90, n_effective=90.0, mad=100.0),
    "peak_memory": Metric(median=3.5 * 2**30, unit="bytes", better="lower"),
    "final_loss": Metric(median=1.25, unit="1", better="lower", n=20),
}
RECORD = RunRecord(
    run_id="0123456789", created_at="2026-01-01", key=KEY, status="finished", metrics=METRICS, notes=("short",),
    environment={"torch": "2.13", "git_commit": "a" * 40}, loss_finite=True,
)  # fmt: skip


def slower(**changes):
    metrics = METRICS | {"step_time": dataclasses.replace(METRICS["step_time"], median=0.5)}
    return dataclasses.replace(RECORD, run_id="new", metrics=metrics, **changes)


def test_a_record_shows_each_metric_with_unit_spread_and_notes():
    text = report.as_text(report.record_table(RECORD))
    for part in ("Net: 2 x GPU, DDP, bf16-mixed", "250.000 ms", "1.2%", "123,456/s", "3.50 GiB", "1.25", "short"):
        assert part in text


def history(count):
    """Runs that differ by a tenth of a percent."""
    return [
        dataclasses.replace(
            RECORD, run_id=f"h{place}",
            metrics={
                name: dataclasses.replace(metric, median=metric.median * (1 + 0.001 * (place % 3 - 1)))
                for name, metric in METRICS.items()
            },
        )
        for place in range(count)
    ]  # fmt: skip


def test_a_conclusion_shows_verdicts_with_severity_and_what_else_changed():
    new = slower(environment={"torch": "2.13", "git_commit": "b" * 40}, plan={"precision": "fp8"})
    text = report.as_text(report.conclusion_table(conclude(new, history(8))))
    for part in (
        "against the 8 runs of this key before",
        "step time",
        "500.000 ms",
        "+100.0%",
        "severe regression",
        "pass",
        "changed: environment.git_commit aaaaaaaaaa.. -> bbbbbbbbbb..",
        "changed: plan.precision none -> fp8",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("count", "remark"),
    [
        (1, "1 run before: too few to judge; about 4 more needed"),
        (4, "4 runs before: too few to judge; about 1 more needed"),
    ],
)
def test_too_few_runs_still_give_a_first_answer(count, remark):
    text = report.as_text(report.conclusion_table(conclude(slower(), history(count))))
    assert "+100" in text
    assert "too few runs" in text
    assert remark in text
    assert text.count(remark) == 1
    assert "regression" not in text


def test_another_environment_is_told_as_the_reason_for_no_verdict():
    new = slower(environment={"torch": "2.14"})
    text = " ".join(report.as_text(report.conclusion_table(conclude(new, history(8)))).split())
    assert "no baseline" in text
    assert "torch 2.13 -> 2.14" in text


def test_a_short_run_says_that_it_is_too_short():
    metrics = METRICS | {"step_time": dataclasses.replace(METRICS["step_time"], n=2)}
    new = dataclasses.replace(RECORD, metrics=metrics, details={"first_step": 1})
    assert "2 steady steps: too few to compare" in report.as_text(report.conclusion_table(conclude(new, history(8))))


def test_a_conclusion_fits_80_columns_uncut():
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(report.conclusion_table(conclude(slower(), history(8))))
    assert "…" not in capture.get()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.5, "s", "2.500 s"), (0.0015, "s", "1.500 ms"), (2**20, "bytes", "1.0 MiB"), (0.41234, "1", "0.4123"),
        (12.345, "samples/s", "12.3/s"),
    ],
)  # fmt: skip
def test_values_read_well(value, unit, text):
    assert report.show_value(value, unit) == text


def test_loggers_get_medians_under_kpt():
    assert report.log_values(RECORD)["kpt/step_time"] == 0.25
    assert set(report.log_values(RECORD)) == {f"kpt/{name}" for name in METRICS}
