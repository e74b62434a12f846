"""Compiled code runs as Python for a while, and is kept."""

import subprocess
import sys

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from kpt_lightning.validation.compiled import run_uncompiled


def test_compiled_code_is_kept_while_it_runs_as_python() -> None:
    torch._dynamo.reset()
    model, counter, calls = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), CompileCounter(), []
    run = torch.compile(model, backend=counter)
    x = torch.ones(1, 2)
    run(x)
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    with run_uncompiled(), run_uncompiled():
        run(x)
    handle.remove()
    run(x)
    assert calls == [1]
    assert counter.frame_count == 1


def test_the_compiler_is_not_loaded_for_it() -> None:
    lines = (
        "import sys, kpt_lightning.validation.compiled as c",
        "with c.run_uncompiled(): pass",
        "print('torch._dynamo' in sys.modules)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
