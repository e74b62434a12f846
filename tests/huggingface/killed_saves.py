"""Run by test_checkpoint.py: kills a save at each of its file operations in turn, and looks at what is left.

python killed_saves.py FOLDER exchange|renames
"""

import json
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kpt_lightning.config import KptConfig
from kpt_lightning.huggingface import atomic_folder
from kpt_lightning.huggingface.checkpoint import atomic_save_state, checked_load_state


class Session:
    """What the state file tells."""

    config, plans = KptConfig(), []


def main() -> None:
    folder, way = Path(sys.argv[1]), sys.argv[2]
    if way == "renames":
        # As on a filesystem that cannot exchange two names.
        atomic_folder.exchange = lambda first, second: False
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    found = []
    for kill_at in range(1, 1000):
        base = folder / str(kill_at)
        base.mkdir()
        save(accelerator, model, optimizer, base, 1.0)
        (base / "latest" / "notes.txt").write_text("mine")
        if not killed(partial(save, accelerator, model, optimizer, base, 2.0), base, kill_at):
            break
        found.append(look(accelerator, model, optimizer, base))
    print("RESULT " + json.dumps(found))


def save(accelerator: Any, model: Any, optimizer: Any, base: Path, value: float) -> None:
    """A state that has ``value`` everywhere, so that a mixture of two shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)
    atomic_save_state(accelerator, accelerator.save_state, base / "latest", session=Session())


def killed(run: Any, base: Path, kill_at: int) -> bool:
    """Whether a child that runs it was killed before it was through, at its ``kill_at``-th operation below ``base``."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event.startswith(("os.", "open", "shutil.")) and any(str(base) in str(each) for each in arguments):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        run()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return False
    return os.WTERMSIG(status) == signal.SIGKILL


def look(accelerator: Any, model: Any, optimizer: Any, base: Path) -> dict[str, Any]:
    """What a load finds after the kill, and what lies there after the next save."""
    there = (base / "latest").is_dir()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model.weight.zero_()
        checked_load_state(accelerator, accelerator.load_state, base / "latest", session=Session())
    moments = [float(value) for each in optimizer.state.values() for value in each["momentum_buffer"].unique()]
    loaded = sorted({*model.weight.detach().unique().tolist(), *moments})
    notes = (base / "latest" / "notes.txt").read_text()
    save(accelerator, model, optimizer, base, 3.0)
    return {"there": there, "loaded": loaded, "notes": notes, "left": sorted(os.listdir(base))}


if __name__ == "__main__":
    main()
