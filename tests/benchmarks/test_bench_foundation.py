import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_report_gives_the_committed_tables_from_the_recorded_runs(
    tmp_path: Path, run_script: Callable[..., str], recorded_runs: list[dict[str, Any]], recorded_report: str
) -> None:
    for run in recorded_runs:
        (tmp_path / f"{run['file']}.json").write_text(json.dumps(run))
    rows = [line for line in run_script("bench_foundation.py", "report").splitlines() if line.startswith("|")]
    assert len(rows) == 13
    assert set(rows) <= set(recorded_report.splitlines())
