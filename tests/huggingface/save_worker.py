"""Run by test_checkpoint.py in two processes: saves in the ways that scripts do, and tells what lies there then."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object

from kpt_lightning.errors import KptError
from kpt_lightning.huggingface.checkpoint import atomic_save_state, checked_load_state


def main() -> None:
    base = Path(sys.argv[1])
    torch.set_num_threads(1)
    project = ProjectConfiguration(str(base / "project"), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(cpu=True, project_config=project)
    assert accelerator.num_processes == 2
    model = torch.nn.Linear(4, 4)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), momentum=0.9))

    def save(folder: Path | None) -> str:
        return str(atomic_save_state(accelerator, accelerator.save_state, folder))

    named = [Path(save(None)).name for _ in range(3)]
    found: dict[str, Any] = {"named": named, "kept": sorted(os.listdir(base / "project" / "checkpoints"))}

    project.automatic_checkpoint_naming = False
    for _ in range(2):
        save(base / "all")
        accelerator.wait_for_everyone()
        # Both come to the second save of the same name only after the first was seen.
        found["all"] = sorted(os.listdir(base / "all"))
        accelerator.wait_for_everyone()
    checked_load_state(accelerator, accelerator.load_state, base / "all")

    # One of the two cannot write.
    hook = accelerator.register_save_state_pre_hook(_failing_on(1, accelerator.process_index))
    try:
        save(base / "all")
        raised = "nothing"
    except (KptError, OSError) as error:
        raised = f"{type(error).__name__}: {error}"
    hook.remove()
    accelerator.wait_for_everyone()
    found["raised"] = gather_object([raised])
    found["all_after"] = sorted(os.listdir(base / "all"))
    # As many training scripts do it: the other process goes on to its next step.
    begun = time.monotonic()
    for _ in range(3):
        if accelerator.is_main_process:
            save(base / "main_alone")
    accelerator.wait_for_everyone()
    found["main_alone"], found["seconds"] = sorted(os.listdir(base / "main_alone")), time.monotonic() - begun

    found["base"] = sorted(os.listdir(base))
    if accelerator.is_main_process:
        print("RESULT " + json.dumps(found))
    accelerator.end_training()


def _failing_on(rank: int, mine: int) -> Any:
    def hook(models: Any, weights: Any, output_dir: str) -> None:
        if mine == rank:
            raise OSError("the disk is full")

    return hook


if __name__ == "__main__":
    main()
