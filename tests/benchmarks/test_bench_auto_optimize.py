import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kpt_lightning.config import KptConfig
from kpt_lightning.optimize.plan import Plan


def only(folder: Path, pattern: str) -> dict[str, Any]:
    (path,) = folder.glob(pattern)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_null_counts_no_ops_that_won_and_writes_a_dated_table(tmp_path: Path, run_script: Callable[..., str]) -> None:
    printed = run_script("bench_auto_optimize.py", "null", "--count", "3", "--width", "32")
    run = only(tmp_path, "null-cpu.json")
    won = [trial for trial in run["trials"] if trial["low"] > 1.0 and trial["gain"] >= 1.005]
    assert [trial["candidate"] for trial in run["trials"]] == ["no_op_000", "no_op_001", "no_op_002"]
    assert run["passed"] == [trial["candidate"] for trial in won]
    dated = only(tmp_path, "auto_optimize_null_*.json")
    assert dated["runs"][0]["trials"] == run["trials"]
    (table,) = tmp_path.glob(f"auto_optimize_null_*_{dated['date']}.md")
    assert table.read_text() in printed


@pytest.mark.slow
def test_cpu_measures_plan_and_plain_in_a_process_of_its_own(tmp_path: Path, run_script: Callable[..., str]) -> None:
    settings = ("--models", "mlp", "--levels", "conservative", "--repeats", "1", "--max-seconds", "1")
    run_script("bench_auto_optimize.py", "cpu", *settings)
    run = only(tmp_path, "cpu-mlp-conservative.json")
    assert Plan.from_dict(run["plan"]).summary() == run["summary"]
    assert (run["predicted"] is None) == (not run["plan"]["changes"])
    assert all(run["repeats"][0][which]["before"] > 0.0 for which in ("plan", "plain"))
    assert len(list(tmp_path.glob("auto_optimize_cpu_*.md"))) == 1


def cpu_run(plan: list[float], plain: list[float], interval: tuple[float, float] | None) -> dict[str, Any]:
    made = Plan(config=KptConfig(), device="cpu", precision="32", parallel="single", basis="trial").to_dict()
    predicted = None if interval is None else {"gain": 1.1, "low": interval[0], "high": interval[1]}
    repeats = [
        {"plan": {"ratio": one, "rounds": 7}, "plain": {"ratio": other, "rounds": 7}, "load": 0.5}
        for one, other in zip(plan, plain, strict=True)
    ]
    return {
        "title": "a model", "model": "mlp", "level": "balanced", "plain_ms": 20.0, "step": "forward and backward",
        "plan": made, "trial_seconds": 30.0, "predicted": predicted, "repeats": repeats, "load_before": 0.1,
        "environment": {"device": "a CPU", "threads": 2}, "date": "2026-01-31",
    }  # fmt: skip


@pytest.mark.usefixtures("scripts")
def test_cpu_table_counts_what_the_interval_held_and_what_was_slower() -> None:
    from auto_optimize_tables import cpu_table

    held_nine = cpu_run([1.1] * 9 + [1.2], [1.0] * 10, (1.05, 1.15))
    held_eight = cpu_run([1.1] * 8 + [1.04, 1.16], [1.0] * 9 + [0.96], (1.05, 1.15))
    slower = cpu_run([0.98] * 6 + [1.0] * 4, [1.02] * 10, None)
    text = cpu_table([held_nine, held_eight, slower])
    assert "| 1.100 (1.050 to 1.150) | 1.100 (1.100 to 1.200) | 9 of 10 | 1.000 (1.000 to 1.000) | 0, 0 of 10 |" in text
    assert "held 17 of 20 repeats of 2 plans, and at least 9 of 10 in 1 of these plans" in text
    assert "6 of 30 repeats with the plan, 1 of 30 of A/A; by the median of its repeats 1 of 3 plans: mlp" in text
    assert "median 0.00 %, largest 4.00 %" in text


@pytest.mark.usefixtures("scripts")
def test_gpu_table_holds_each_variant_against_plain(recorded_runs: list[dict[str, Any]]) -> None:
    from auto_optimize_tables import gpu_table

    trial = Plan(config=KptConfig(), device="a GPU", precision="fp8", parallel="single", basis="trial", seconds=61.4)
    plans = {"plain": None, "kpt": trial.to_dict()}
    runs = [
        run | {"plan": plans[run["variant"]], "date": "2026-01-31"}
        for run in recorded_runs
        if run["file"].startswith("speed-") and run["variant"] in plans
    ]
    rows = {line.split(" | ")[0]: line for line in gpu_table(runs).splitlines() if line.startswith("| ")}
    assert (
        "| 224.3, 224.7 (n = 42 steps) | 221.3 to 228.6 | 72,974 | 1.60x | 41.3 | 1740, 589 | 61, 61 |" in rows["| kpt"]
    )
    assert rows["| kpt"].endswith("| 16 x cudnn, causal, no mask tensor |")
    assert "| 1.00x | 77.7 | 1770, 692 | no trial |" in rows["| plain"]


QKV = "[4, 32, 4096, 64], [4, 8, 4096, 64], [4, 8, 4096, 64]"


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (
            f"cudnn_attention inputs [{QKV}, [4, 1, 4096, 4096], [], [], [], [], []] "
            "values [None, None, None, None, True, 0.0, False, False, 0.125]",
            "cudnn, not causal, mask tensor 4 x 1 x 4096 x 4096",
        ),
        (
            f"efficient_attention inputs [{QKV}, [], [], [], [], []] "
            "values [None, None, None, None, True, 0.0, True, 0.125]",
            "efficient, causal, no mask tensor",
        ),
        (
            f"flash_attention inputs [{QKV}, [], [], [], []] values [None, None, None, 0.0, True, False, 0.125]",
            "flash, causal, no mask tensor",
        ),
        ("math inputs [] values []", "aten::_scaled_dot_product_math inputs [] values []"),
    ],
)
def test_attention_is_told_with_its_mask(seen: str, said: str) -> None:
    from auto_optimize_tables import describe_attention

    assert describe_attention(f"aten::_scaled_dot_product_{seen}") == said
