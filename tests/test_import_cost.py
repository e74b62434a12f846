"""What ``import kpt_lightning`` costs and changes: nearly nothing, and nothing."""

import json
import subprocess
import sys

import pytest

HEAVY = ("lightning", "transformers", "accelerate", "pydantic", "sqlalchemy", "typer", "rich", "triton", "pynvml")

LOADED = """
import json, sys
import {module}
print(json.dumps(sorted(sys.modules)))
"""

STATE = """
import json, logging, os, signal, sys, warnings
import torch

def state():
    return {{
        "environment": dict(os.environ),
        "log levels": {{name: logging.getLogger(name).level for name in (None, "torch", "lightning", "py.warnings")}},
        "log handlers": [repr(handler) for handler in logging.getLogger().handlers],
        "warning filters": [repr(entry) for entry in warnings.filters],
        "default dtype": str(torch.get_default_dtype()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "random state": torch.get_rng_state().tolist()[:64],
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "excepthook": repr(sys.excepthook),
        "cuda started": torch.cuda.is_initialized(),
    }}

before = state()
import {module}
print(json.dumps([before, state()]))
"""


def run(code: str, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)


def import_times(code: str) -> dict[str, int]:
    """Microseconds of each import with all that it imported, as ``python -X importtime`` prints them."""
    rows = [line.split("|") for line in run(code, "-X", "importtime").stderr.splitlines() if line.count("|") == 2]
    return {name.strip(): int(cumulative) for _, cumulative, name in rows if cumulative.strip().isdigit()}


@pytest.mark.parametrize("module", ["kpt_lightning", "kpt_lightning.hardware", "kpt_lightning.hardware.detection"])
def test_importing_changes_nothing_in_the_process(module: str) -> None:
    before, after = json.loads(run(STATE.format(module=module)).stdout)
    assert after == before
    assert after["cuda started"] is False


def test_importing_loads_no_heavy_package() -> None:
    modules = set(json.loads(run(LOADED.format(module="kpt_lightning")).stdout))
    assert modules.isdisjoint(HEAVY)


def test_importing_costs_at_most_a_fifth_of_importing_torch() -> None:
    # Both in one process, so that a busy machine slows both; the least disturbed of three runs counts.
    ratios = []
    for _ in range(3):
        times = import_times("import torch; import kpt_lightning")
        ratios.append(times["kpt_lightning"] / times["torch"])
    assert min(ratios) <= 0.2


def test_taking_a_name_leaves_pythons_random_numbers_alone() -> None:
    code = "import random; random.seed(0); a = random.getstate(); import kpt_lightning; kpt_lightning.auto_optimize"
    done = subprocess.run([sys.executable, "-c", f"{code}; assert random.getstate() == a"], check=False)
    assert done.returncode == 0
