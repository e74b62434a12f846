"""``kpt finetune``, run as a user runs it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.cli.kpt_command import kpt

KPT = (sys.executable, "-m", "kpt_lightning.cli.main", "finetune")
SMALL = ("--set", "model=vit-tiny", "--set", "held_out_batches=2", "--batch-size", "16")


def test_list_names_every_recipe() -> None:
    from kpt_lightning.recipes.registry import RECIPES

    done = kpt("finetune", "--list")
    assert done.status == 0
    assert all(name in done.out for name in RECIPES)


def test_options_and_settings_end_in_the_printed_config() -> None:
    done = kpt(
        "finetune", "causal-lm-lora", "--steps", "9", "--data", "notes.txt", "--set", "lora.rank=4",
        "--set", "lora.target_modules=[\"q_proj\"]", "--learning-rate", "1e-3", "--print-config",
    )  # fmt: skip
    assert (done.status, done.err) == (0, "")
    config = yaml.safe_load(done.out)
    assert (config["steps"], config["learning_rate"], config["data"]["source"]) == (9, 1e-3, "notes.txt")
    assert config["lora"] == {"rank": 4, "alpha": 16, "dropout": 0.0, "target_modules": ["q_proj"]}


def test_the_printed_config_needs_no_torch() -> None:
    code = (
        "import sys; from kpt_lightning.cli.main import app; "
        "app(['finetune', 'masked-lm', '--print-config'], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nFalse\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such",), "kpt: recipe='no-such': is no recipe. Known: causal-lm-full, "),
        (("masked-lm", "--set", "lr=1"), "kpt: lr=1: is not a setting. Known here: recipe, model, "),
        (("masked-lm", "--set", "steps"), "kpt: --set='steps': is no NAME=VALUE."),
        (("masked-lm", "--steps", "3", "--set", "steps=4"), "kpt: --set='steps=4': steps is given twice."),
        (("masked-lm", "--overwrite"), "kpt: --overwrite=True: nothing is written without --output."),
        (("masked-lm", "--plain", "--config", "x.yaml"), "kpt: --config='x.yaml': would be ignored beside --plain."),
        (("causal-lm-full", "--merge", "--output", "x"), "kpt: merge=True: 'causal-lm-full' has no adapters."),
        ((), "kpt: recipe='': is no recipe. Known: "),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line_and_status_2(arguments: tuple[str, ...], said: str) -> None:
    done = kpt("finetune", *arguments)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(said)


def test_a_run_prints_the_report_and_writes_the_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = kpt("finetune", "image-classification", *SMALL, "--steps", "3", "--output", str(output), "--plain")
    assert done.status == 0, done.err
    assert "held-out loss" in done.out
    assert "samples/s" in done.out
    assert (output / "model.safetensors").exists()


def test_ctrl_c_leaves_the_model_folder_as_it_was(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").touch()
    command = [*KPT, "image-classification", *SMALL, "--steps", "100000", "--output", str(output), "--overwrite"]
    running = subprocess.Popen(
        [*command, "--plain"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert running.stdout is not None
    while "Training: " not in running.stdout.readline():
        assert running.poll() is None
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    # 128 + SIGINT, as a shell says it.
    assert running.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.iterdir()] == ["mine"]
