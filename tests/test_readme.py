import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PYTHON_BLOCK = re.search(r"```python\n(.*?)```", README, re.DOTALL)

# What the README leaves to the reader, small; no worker processes for data in memory.
PREAMBLE = """
import warnings
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
warnings.filterwarnings("ignore", ".*does not have many workers.*")
model, loader = BoringModel(), torch.utils.data.DataLoader(RandomDataset(32, 64))
"""


def named_paths(text: str) -> list[str]:
    """What stands in backticks and looks like a file or folder of the repository."""
    looks_so = r"(?:[\w.-]+/)+[\w.-]*|[\w.-]+\.(?:md|py|toml|txt)|LICENSE"
    return sorted({span for span in re.findall(r"`([^`\s]+)`", text) if re.fullmatch(looks_so, span)})


def test_readme_is_at_most_120_lines() -> None:
    assert len(README.splitlines()) <= 120


def test_first_example_is_at_most_ten_lines_and_runs(tmp_path: Path) -> None:
    assert PYTHON_BLOCK is not None
    block = PYTHON_BLOCK.group(1)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    script = tmp_path / "train.py"
    script.write_text(PREAMBLE + block)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing to compare with" in done.stdout
    assert (tmp_path / ".kpt/runs.sqlite").exists()


@pytest.mark.parametrize("path", named_paths(README) + named_paths(CONTRIBUTING))
def test_named_path_exists(path: str) -> None:
    # Made on the reader's machine, or the reader's own.
    if path in {".venv/bin/pre-commit", "callbacks.py", "train.py"}:
        return
    folders = (ROOT, ROOT / "kpt_lightning")
    assert any((folder / path).exists() for folder in folders), f"{path} is named and does not exist"


def test_readme_names_five_files_to_read_first() -> None:
    section = README.split("## Read these five files first")[1].split("\n## ")[0]
    assert len(re.findall(r"^\d\. `kpt_lightning/\S+\.py`", section, re.MULTILINE)) == 5


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z]+)\b", README + CONTRIBUTING)) - {"the"}))
def test_named_make_target_exists(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:.*## \w", makefile, re.MULTILINE), f"make {target} is named and is no target"


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`kpt ([a-z-]+(?: [a-z-]+)?)", README))))
def test_named_kpt_command_exists(command: str) -> None:
    from kpt_lightning.cli.main import app

    found: Any = typer.main.get_command(app)
    for word in command.split():
        if hasattr(found, "commands"):
            found = found.commands[word]


@pytest.mark.parametrize("extra", ["gpu", "kernels", "finetune", "accelerate", "postgres", "te", "xla"])
def test_named_extra_exists(extra: str) -> None:
    import tomllib

    assert f"`{extra}`" in README
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in project["optional-dependencies"]


def test_no_committed_text_names_a_place_on_one_machine() -> None:
    names = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "constraints.txt", ".pre-commit-config.yaml"]
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|opt|work|mnt|Users)/|file://", text), name
