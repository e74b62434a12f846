import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RECORDED = BENCHMARKS / "results" / "foundation_nvidia-h200_2026-11-23"


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., str]:
    """Run a benchmark script as a person does, with ``--out`` in ``tmp_path``, and return what it printed."""

    def run(script: str, *arguments: str) -> str:
        command = [sys.executable, str(BENCHMARKS / script), *arguments, "--out", str(tmp_path)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test import what lies beside the scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="session")
def recorded_runs() -> list[dict[str, Any]]:
    """What training processes wrote on an H200."""
    runs: list[dict[str, Any]] = json.loads(RECORDED.with_suffix(".json").read_text())["runs"]
    return runs


@pytest.fixture(scope="session")
def recorded_report() -> str:
    """The committed table of these runs."""
    return RECORDED.with_suffix(".md").read_text()
