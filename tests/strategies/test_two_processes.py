"""Real runs of two processes over gloo (and NCCL where there are two GPUs), against one process on the same batches."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")


def launch(folder: Path, *arguments: str, torchrun: bool = False) -> dict[str, Any]:
    """Run the worker and read what rank 0 printed."""
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if torchrun else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("MASTER_PORT", "MASTER_ADDR", "LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK"):
        environment.pop(name, None)
    command = [sys.executable, *starter, str(WORKER), "--folder", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs by their arguments, each once."""

    @functools.cache
    def cached(*arguments: str) -> dict[str, Any]:
        return launch(tmp_path_factory.mktemp("run"), *arguments)

    return cached


def distance(first: dict[str, list[float]], second: dict[str, list[float]]) -> float:
    """Largest absolute difference of two sets of weights of the same names."""
    assert first.keys() == second.keys()
    return max(float((torch.tensor(first[name]) - torch.tensor(second[name])).abs().max()) for name in first)


ONE = ("--parallel", "single", "--devices", "1")
PARALLEL = ("ddp", "fsdp2")


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_train_to_the_weights_of_one(run: Any, parallel: str) -> None:
    two = run("--parallel", parallel)
    assert two["world_size"] == 2
    assert two["strategy"] == {"ddp": "KptDDP", "fsdp2": "KptFSDP2"}[parallel]
    assert distance(two["two_epochs"], run(*ONE)["two_epochs"]) < 1e-5


@pytest.mark.parametrize("parallel", PARALLEL)
def test_gradients_are_reduced_once_for_an_optimizer_step(run: Any, parallel: str) -> None:
    names = run("--parallel", parallel)["reductions"]
    if parallel == "ddp":
        assert names == ["c10d::allreduce_"]  # one bucket holds this model
    else:  # all-reduces are those of the norm
        assert names.count("c10d::_reduce_scatter_base_") == 3  # each block and the root


@pytest.mark.parametrize("parallel", PARALLEL)
def test_the_norm_is_clipped_over_all_shards(run: Any, parallel: str) -> None:
    norms, reference = run("--parallel", parallel)["norms"], run(*ONE)["norms"]
    assert max(reference) > 0.499  # clipping was at work
    assert torch.allclose(torch.tensor(norms), torch.tensor(reference), atol=1e-3)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_resumed_run_ends_as_an_uninterrupted_one(run: Any, parallel: str) -> None:
    two = run("--parallel", parallel)
    assert distance(two["resumed"], two["four_epochs"]) < 1e-6


@pytest.mark.parametrize("parallel", PARALLEL)
def test_predictions_of_both_ranks_are_those_of_one_process(run: Any, parallel: str) -> None:
    two, one = run("--parallel", parallel), run(*ONE)
    # Rank 0 predicts every second sample.
    assert torch.allclose(torch.tensor(two["predictions"]), torch.tensor(one["predictions"])[::2], atol=1e-3)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-3)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_state_dict_keys_are_those_of_the_plain_module(run: Any, parallel: str) -> None:
    assert run("--parallel", parallel)["keys"] == run(*ONE)["keys"]


@pytest.mark.parametrize("parallel", PARALLEL)
def test_fp8_runs_and_is_proved_in_two_processes(run: Any, parallel: str) -> None:
    two = run("--parallel", parallel, "--precision", "fp8")
    proofs = {proof["subject"]: proof for proof in two["plan"]["proofs"]}
    assert proofs["fp8 calls"]["accepted"]
    assert "output 8, grad_input 8, grad_weight 8" in proofs["fp8 calls"]["reason"]  # 4 layers, 2 micro-batches
    assert distance(two["resumed"], two["four_epochs"]) < 1e-6
    one = run(*ONE, "--precision", "fp8")
    assert two["held_out"] == pytest.approx(one["held_out"], rel=0.1)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_fabric_trains_to_the_weights_of_one_process(run: Any, parallel: str) -> None:
    two = run("--api", "fabric", "--parallel", parallel)
    assert two["strategy"] == {"ddp": "KptFabricDDP", "fsdp2": "KptFabricFSDP2"}[parallel]
    assert distance(two["two_epochs"], run("--api", "fabric", *ONE)["two_epochs"]) < 1e-4


def test_torchrun_starts_it_and_auto_is_ddp(tmp_path: Path) -> None:
    two = launch(tmp_path, torchrun=True)
    assert (two["strategy"], two["world_size"]) == ("KptDDP", 2)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "fp8"])
def test_two_gpus_train_and_resume(run: Any, parallel: str, precision: str) -> None:
    cuda = ("--accelerator", "cuda", "--precision", precision)
    two, one = run("--parallel", parallel, *cuda), run(*ONE, *cuda)
    assert distance(two["resumed"], two["four_epochs"]) < 1e-5
    assert two["held_out"] == pytest.approx(one["held_out"], rel=0.1)
