"""Both drivers on the same task: the same rows in the same order, the same losses."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kpt_lightning.errors import ConfigError, KptError
from kpt_lightning.recipes import accelerate_run, lightning_run
from kpt_lightning.recipes.config import FineTuneConfig
from kpt_lightning.recipes.registry import default_config
from kpt_lightning.recipes.report import FineTuneResult

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune.py"
Run = Callable[..., FineTuneResult]


@pytest.fixture(autouse=True)
def no_accelerate_state() -> Iterator[None]:
    """Accelerate keeps what the first Accelerator of a process decided."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def config_for(folder: Path, recipe: str, **changes: object) -> FineTuneConfig:
    changes = {"steps": 12, "held_out_batches": 2, "learning_rate": 1e-2, "data": {"sequence_length": 32}} | changes
    return default_config(recipe, model=str(folder), **changes)


def by_lightning(config: FineTuneConfig, **more: object) -> FineTuneResult:
    return lightning_run.fine_tune(config, strategy="auto", say=lambda said: None, **more)


def by_accelerate(config: FineTuneConfig, **more: object) -> FineTuneResult:
    return accelerate_run.fine_tune(config, say=lambda said: None, **more)


@pytest.mark.parametrize("recipe", ["causal-lm-full", "causal-lm-lora", "causal-lm-qlora"])
def test_both_drivers_lower_the_held_out_loss_along_the_same_curve(byte_folder: Path, recipe: str) -> None:
    config = config_for(byte_folder, recipe, gradient_accumulation=2, learning_rate=3e-2)
    one, two = by_lightning(config), by_accelerate(config)
    assert one.loss_after < one.loss_before - 0.02
    assert one.losses == pytest.approx(two.losses, abs=1e-4)
    assert len(one.losses) == 12 * 2
    assert one.before == pytest.approx(two.before, abs=1e-4)
    assert one.after == pytest.approx(two.after, abs=1e-4)
    assert one.count == two.count == 12 * 2 * 2 * 32


@pytest.mark.parametrize("run", [by_lightning, by_accelerate])
def test_the_random_state_of_the_user_is_left_alone(byte_folder: Path, run: Run) -> None:
    before = torch.random.get_rng_state()
    run(config_for(byte_folder, "causal-lm-lora", steps=1))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("run", [by_lightning, by_accelerate])
def test_a_diverged_run_stops_and_leaves_the_old_folder(byte_folder: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    config = config_for(byte_folder, "causal-lm-full", learning_rate=1e30, output=output)
    with pytest.raises(KptError, match=r"the loss of step \d+ is (nan|inf): training has diverged"):
        run(config, overwrite=True)
    assert [path.name for path in output.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("run", [by_lightning, by_accelerate])
def test_an_output_in_use_is_refused_before_anything_is_loaded(tmp_path: Path, run: Run) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match=r"is not empty. Name another folder, or allow it with --overwrite"):
        run(config_for(Path("no/model"), "causal-lm-full", output=tmp_path))


def test_kpt_proves_what_it_did_in_lightning_and_the_report_says_so(byte_folder: Path) -> None:
    from kpt_lightning import KptStrategy

    settings = {"precision": "fp8", "float8": {"emulate": True, "only_where_it_pays": False}}
    said: list[object] = []
    config = config_for(byte_folder, "causal-lm-full")
    result = lightning_run.fine_tune(config, strategy=KptStrategy(settings), say=said.append)
    plain = by_lightning(config)
    assert result.plan is not None
    assert result.plan.float8_layers
    assert result.loss_after == pytest.approx(plain.loss_after, rel=0.02)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(result.table())
    for part in ("held-out loss", "held-out accuracy", "768 tokens in", "peak memory", "fp8", "proved"):
        assert part in capture.get()


def test_an_accelerator_of_kpt_brings_its_plan(byte_folder: Path) -> None:
    settings = {"precision": "fp8", "float8": {"emulate": True, "only_where_it_pays": False}}
    config = config_for(byte_folder, "causal-lm-full")
    accelerator = accelerate_run.make_accelerator(config, settings=settings)
    result = accelerate_run.fine_tune(config, accelerator=accelerator, say=lambda said: None)
    accelerator.kpt.stop()
    assert result.plan is not None
    assert result.plan.float8_layers
    assert result.loss_after < result.loss_before


def test_an_accelerator_that_accumulates_otherwise_is_refused(byte_folder: Path) -> None:
    config = config_for(byte_folder, "causal-lm-full")
    accelerator = accelerate_run.make_accelerator(config.changed(gradient_accumulation=4), kpt=False)
    with pytest.raises(ConfigError, match="gradient_accumulation=1: the Accelerator accumulates over 4"):
        by_accelerate(config, accelerator=accelerator)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), ("-m", "kpt_lightning.launch")], ids=["plain", "kpt"])
def test_the_example_runs_under_accelerate_launch_with_the_losses_of_lightning(
    byte_folder: Path, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    config = config_for(byte_folder, "causal-lm-lora", steps=3, learning_rate=1e-3, held_out_batches=8)
    losses = tmp_path / "losses.json"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = [str(EXAMPLE), "causal-lm-lora", "--model", str(byte_folder), "--steps", "3", "--sequence-length", "32"]
    command = [*accelerate, *launcher, *script, "--losses", str(losses)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(losses.read_text()) == pytest.approx(by_lightning(config).losses, abs=1e-4)
