import json
import subprocess
import sys
from typing import Any

import lightning.pytorch  # noqa: F401  its import sets an environment variable, which a test may not
import pytest
import torch

from tests.benchmarks.conftest import BENCHMARKS

pytestmark = pytest.mark.usefixtures("scripts")


def test_what_no_kernel_covers_is_a_gap_named_by_its_neighbours() -> None:
    from step_gaps import PROFILED, read_gaps

    # Microseconds; the second overlaps the first, on another stream, and ends the later.
    found = read_gaps(
        [(0, 1000, "a"), (500, 1500, "b"), (2500, 3000, "c"), (3000, 4000, "a"), (4200, 4300, "c")], PROFILED
    )
    assert found["span_ms"] == pytest.approx(4.3 / PROFILED)
    assert found["idle_ms"] == pytest.approx(1.2 / PROFILED)
    assert found["kernels"][0] == ("a", 2 / PROFILED, pytest.approx(2.0 / PROFILED))
    gaps = {(before, after): (count, total, longest) for before, after, count, total, longest in found["gaps"]}
    assert gaps["b", "c"] == pytest.approx((1 / PROFILED, 1.0 / PROFILED, 1.0))
    assert gaps["a", "c"] == pytest.approx((1 / PROFILED, 0.2 / PROFILED, 0.2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what is said where there is no GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(BENCHMARKS / "step_gaps.py"), "--variant", "kpt", "--out", "gaps.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stderr


def test_the_table_of_loss_runs_says_how_far_each_is_behind_bf16() -> None:
    from bench_loss_run import table

    stem = BENCHMARKS / "results" / "loss_run_nvidia-h200_2026-11-23"
    runs: list[dict[str, Any]] = json.loads(stem.with_suffix(".json").read_text())["runs"]
    for run in runs:
        run["losses"] = {int(seed): losses for seed, losses in run["losses"].items()}
    lines = table(runs, "anything").splitlines()
    published = stem.with_suffix(".md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == [line for line in published if line.startswith("|")]
    assert "| 0.25% | tensorwise | 80 | 10.794, 11.286, 11.502 | 12.19 | +1.9% |" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what is said where there is no GPU")
def test_kernels_are_not_timed_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_kernels.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "needs an NVIDIA GPU with FP8 units" in done.stderr


def test_candidates_are_stacked_and_each_says_what_it_adds(run_script: Any, tmp_path: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("emulates FP8, which a GPU need not")
    told = run_script(
        "candidate_stack.py", "--shape", "tiny", "--batch", "2", "--length", "32", "--steps", "3",
        "--stack", "float8", "float8_mlp", "channels_last",
    )  # fmt: skip
    assert "| float8_mlp |" in told
    assert "no 2-D convolution" in told
    (path,) = tmp_path.glob("candidate_stack_*.json")
    runs = json.loads(path.read_text())["runs"]
    assert [run["entry"] for run in runs] == ["plain", "float8", "float8_mlp", "channels_last"]
    assert [len(run.get("step_ms", ())) for run in runs] == [3, 3, 3, 0]
