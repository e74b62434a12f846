"""Looking into compiled code: hooks there are compiled in too, or not seen at all."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def run_uncompiled() -> AbstractContextManager[object]:
    """What was compiled runs as Python while entered, hooks inside of it too; its code is kept."""
    # Where the compiler was never loaded nothing is compiled, and loading it takes a second.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
