"""``kpt config``, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kpt_lightning.config import KptConfig, json_schema


def kpt(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "kpt_lightning.cli.main", "config", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_schema_prints_the_schema_and_nothing_else() -> None:
    done = kpt("--schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json_schema()


def test_the_printed_defaults_are_a_file_that_checks_and_sets_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(kpt("--default").stdout)
    assert KptConfig.from_yaml(path) == KptConfig()
    assert KptConfig.from_yaml(path).model_fields_set == set(KptConfig.model_fields)
    assert kpt("--check", str(path)).returncode == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it sets nothing\n"),
        ("precision: fp8\nfloat8: {recipe: rowwise}\n", "precision: fp8\nfloat8:\n  recipe: rowwise\n"),
    ],
    ids=["empty", "two settings"],
)
def test_check_says_what_a_right_file_sets(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    done = kpt("--check", str(path))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{path}: right\n{said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [("precison: fp8\n", "kpt: precison='fp8': is not a setting."), (None, "kpt: config="), ("a: [", "kpt: config=")],
    ids=["unknown key", "no file", "no YAML"],
)
def test_a_wrong_file_is_one_line_on_stderr_and_status_2(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    done = kpt("--check", str(path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(said)


@pytest.mark.parametrize("arguments", [[], ["--schema", "--default"], ["--default", "--check", "x.yaml"]], ids=str)
def test_none_or_two_of_the_options_are_refused(arguments: list[str]) -> None:
    done = kpt(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "exactly one of --schema, --default and --check FILE" in done.stderr


def test_the_command_loads_no_torch() -> None:
    code = "import sys; from kpt_lightning.cli.main import app; app(['config', '--schema'], standalone_mode=False); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("}\nFalse\n")
