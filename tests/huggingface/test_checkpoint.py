"""save_state whole or not at all, with weights that a plain script loads. Real kills, real processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file

from kpt_lightning.config import KptConfig
from kpt_lightning.huggingface import atomic_folder
from kpt_lightning.huggingface.checkpoint import atomic_save_state, checked_load_state
from kpt_lightning.huggingface.saved_state import FILE_NAME
from kpt_lightning.huggingface.session import Session

HERE = Path(__file__).parent
FP8 = {"precision": "fp8", "float8": {"emulate": True, "only_where_it_pays": False}}


def run(*command: str) -> Any:
    """What a script of this folder printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parents[1])}
    for name in ("MASTER_PORT", "MASTER_ADDR", "LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=100, env=environment, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.fixture(autouse=True)
def _no_state_left() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(session: Session | None = None, **accelerator_options: Any) -> tuple[Accelerator, torch.nn.Module]:
    """An Accelerator with a small model that made one step."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, **accelerator_options)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if session is not None:
        session.convert(accelerator.state, [model, optimizer])
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.ones(2, 16)).sum())
    optimizer.step()
    return accelerator, model


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_save_killed_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path, way: str) -> None:
    found = run(str(HERE / "killed_saves.py"), str(tmp_path), way)
    assert len(found) > 20
    # The first value was saved whole, the second is that of the killed save.
    assert all(each["loaded"] in ([1.0], [2.0]) for each in found)
    assert {1.0, 2.0} == {each["loaded"][0] for each in found}
    assert all(each["notes"] == "mine" and each["left"] == ["latest"] for each in found)
    assert [each["there"] for each in found].count(False) <= (0 if way == "exchange" else 1)


def test_two_processes_save_one_whole_checkpoint(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    found = run(*launcher, str(HERE / "save_worker.py"), str(tmp_path))
    alone = ["model.safetensors", "optimizer.bin", "random_states_0.pkl"]
    assert found["named"] == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]
    assert found["kept"] == ["checkpoint_1", "checkpoint_2"]
    assert found["all"] == found["all_after"] == [*alone, "random_states_1.pkl"]
    assert "process 1 could not write" in found["raised"][0]
    assert found["raised"][1] == "OSError: the disk is full"
    # Nobody waits for a process that never comes, but for once.
    assert found["main_alone"] == alone
    assert found["seconds"] < 10
    assert found["base"] == ["all", "main_alone", "project"]


def test_automatic_names_keep_their_limit_and_the_older_one_until_the_newer_is_whole(tmp_path: Path) -> None:
    project = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True, total_limit=1)
    accelerator, _ = trained(project_config=project)
    seen = []
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: (
            seen.append(sorted(os.listdir(tmp_path / "checkpoints"))) if (tmp_path / "checkpoints").is_dir() else None
        )
    )
    paths = [atomic_save_state(accelerator, accelerator.save_state) for _ in range(3)]
    assert paths == [tmp_path / "checkpoints" / f"checkpoint_{number}" for number in range(3)]
    assert seen == [["checkpoint_0"], ["checkpoint_1"]]
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint_2"]
    assert os.listdir(tmp_path) == ["checkpoints"]
    checked_load_state(accelerator, accelerator.load_state)
    project.iteration = 2
    with pytest.raises(ValueError, match="already exists"):
        atomic_save_state(accelerator, accelerator.save_state)


def test_a_converted_model_saves_what_the_plain_one_does_and_each_loads_the_other(tmp_path: Path) -> None:
    plain, plain_model = trained()
    atomic_save_state(plain, plain.save_state, tmp_path / "plain")
    AcceleratorState._reset_state(reset_partial_state=True)
    session = Session(FP8, say=lambda line: None)
    converted, converted_model = trained(session)
    assert session.plans[0].float8_layers == ["0", "2"]
    atomic_save_state(converted, converted.save_state, tmp_path / "kpt", session=session)
    saved = {name: load_file(tmp_path / name / "model.safetensors") for name in ("plain", "kpt")}
    assert [(name, each.dtype) for name, each in saved["kpt"].items()] == [
        (name, each.dtype) for name, each in saved["plain"].items()
    ]
    # What neither wrapper nor state file of ours is needed for.
    plain.load_state(str(tmp_path / "kpt"))
    assert torch.equal(plain_model[0].weight, saved["kpt"]["0.weight"])
    checked_load_state(converted, converted.load_state, tmp_path / "plain", session=session)
    assert torch.equal(converted_model[0].weight, saved["plain"]["0.weight"])
    session.stop()


def test_another_plan_model_or_version_is_told_with_both_values(tmp_path: Path) -> None:
    session = Session(FP8, say=lambda line: None)
    accelerator, _ = trained(session)
    atomic_save_state(accelerator, accelerator.save_state, tmp_path / "one", session=session)
    state = json.loads((tmp_path / "one" / FILE_NAME).read_text())
    assert state["config"] == KptConfig.build(FP8).model_dump(mode="json", exclude_unset=True)
    assert state["plans"] == [session.plans[0].to_dict()]
    checked_load_state(accelerator, accelerator.load_state, tmp_path / "one", session=session)
    state["versions"]["torch"], state["models"], state["plans"] = "2.0", ["Bert"], []
    (tmp_path / "one" / FILE_NAME).write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="is loaded as it is") as told:
        checked_load_state(accelerator, accelerator.load_state, tmp_path / "one", session=session)
    text = str(told[0].message)
    assert "model Bert (now Sequential)" in text
    assert "plan none (now fp8; float8 (tensorwise, 2))" in text
    assert f"torch 2.0 (now {torch.__version__})" in text
    (tmp_path / "one" / FILE_NAME).write_text("{")
    with pytest.warns(UserWarning, match="Delete it: the weights do not need it"):
        checked_load_state(accelerator, accelerator.load_state, tmp_path / "one", session=session)
    session.stop()


def test_a_save_that_raises_leaves_the_old_one_and_nothing_beside(tmp_path: Path) -> None:
    accelerator, _ = trained()
    atomic_save_state(accelerator, accelerator.save_state, tmp_path / "one")
    before = (tmp_path / "one" / "model.safetensors").read_bytes()

    def fail(models: Any, weights: Any, folder: str) -> None:
        raise OSError("the disk is full")

    accelerator.register_save_state_pre_hook(fail)
    with pytest.raises(OSError, match="the disk is full"):
        atomic_save_state(accelerator, accelerator.save_state, tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["one"]


def test_a_working_directory_is_written_file_by_file_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, _ = trained()
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="replaced one by one"):
        atomic_save_state(accelerator, accelerator.save_state, ".")
    assert sorted(os.listdir()) == ["model.safetensors", "notes.txt", "optimizer.bin", "random_states_0.pkl"]


def test_a_link_stays_a_link_and_a_file_is_refused(tmp_path: Path) -> None:
    accelerator, _ = trained()
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "disk")
    atomic_save_state(accelerator, accelerator.save_state, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="a checkpoint is a folder"):
        atomic_save_state(accelerator, accelerator.save_state, tmp_path / "file")
    with pytest.raises(ValueError, match="needs output_dir"):
        atomic_save_state(accelerator, accelerator.save_state)


def test_a_folder_that_a_living_process_writes_is_no_leftover(tmp_path: Path) -> None:
    accelerator, _ = trained()
    other = atomic_folder.Place.of(tmp_path / "two")
    (tmp_path / f".three.rank0{atomic_folder.PARTIAL}" / "three").mkdir(parents=True)
    with atomic_folder.staged(other, "rank0") as writing:
        atomic_save_state(accelerator, accelerator.save_state, tmp_path / "one")
        assert writing.is_dir()
    assert os.listdir(tmp_path) == ["one"]
