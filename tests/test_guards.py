"""The guards in conftest.py, in a pytest process of their own."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

LEAKS = {
    "environment": ("import os; os.environ['LEFT_BEHIND'] = '1'", "changed environment variables.*LEFT_BEHIND"),
    "dtype": ("import torch; torch.set_default_dtype(torch.float64)", "float32 -> torch.float64"),
    "deterministic": ("import torch; torch.use_deterministic_algorithms(True)", "deterministic.*False -> True"),
    "tf32": ("import torch; torch.set_float32_matmul_precision('high')", "highest -> high"),
    "process_group": (
        "import torch; torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0,"
        " world_size=1)",
        "left torch.distributed initialized",
    ),
}


def test_each_leak_fails_its_test_and_the_next_test_starts_clean(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    lines = []
    for name, (leak, _) in LEAKS.items():
        lines.append(f"def test_{name}():\n    {leak}\n\ndef test_after_{name}():\n    pass\n")
    (tmp_path / "test_leaks.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"{2 * len(LEAKS)} passed, {len(LEAKS)} errors" in done.stdout
    for _, finding in LEAKS.values():
        assert re.search(finding, done.stdout), finding


def test_missing_hardware_is_named_in_the_reason_of_the_skip(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_gpu.py").write_text(
        "import pytest, torch\n\n@pytest.mark.multi_gpu\ndef test_many():\n    assert torch.cuda.device_count() >= 2\n"
    )
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout or "needs two or more NVIDIA GPUs; this machine has" in done.stdout
