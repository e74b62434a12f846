import dataclasses

import pytest
from rich.console import Console

from kpt_lightning.tracking import report
from kpt_lightning.tracking.compare import compare_runs
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


def test_a_comparison_shows_verdicts_the_environment_and_the_source_of_the_noise():
    new = slower(environment={"torch": "2.14", "git_commit": "b" * 40})
    text = report.as_text(report.comparison_table(compare_runs(RECORD, new)))
    for part in (
        "step time",
        "500.000 ms",
        "+100.0%",
        "slower",
        "same within noise",
        "changed: torch 2.13 -> 2.14",
        "may be the cause",
        "commit aaaaaaaaaa -> bbbbbbbbbb",
        "a floor of 1.3%",
        "final_loss: cannot tell",
    ):
        assert part in text, text


def test_a_comparison_fits_80_columns_uncut():
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(report.comparison_table(compare_runs(RECORD, slower())))
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
