import subprocess
import sys

from tests.benchmarks.conftest import BENCHMARKS


def test_runs_of_several_processes_are_all_stored() -> None:
    command = [sys.executable, str(BENCHMARKS / "bench_history.py"), "--processes", "2", "--runs", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 runs of 2 processes" in done.stdout
    assert "order kept" in done.stdout
