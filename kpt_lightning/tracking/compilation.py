"""What torch.compile cost a run: read from dynamo's own books, which it keeps anyway."""

import sys
from dataclasses import dataclass
from typing import Any

INNER = "_compile.compile_inner"
"""Dynamo's name for the compilation of one frame, backend included; torch 2.13, torch/_dynamo/convert_frame.py."""


@dataclass(frozen=True, slots=True)
class Compilation:
    """Compilations of a run.

    Attributes:
        seconds: Time that they took in all, in seconds; training stood still for it.
        graphs: Frames compiled, recompilations included.
        recompiles: Those of a frame that had been compiled before, for other shapes, dtypes or values.
    """

    seconds: float
    graphs: int
    recompiles: int


class CompilationWatch:
    """Counts from its making on. Where nothing was ever compiled dynamo is not even imported."""

    def __init__(self) -> None:
        """Note where dynamo's books stand."""
        self._before = _books()

    def read(self) -> Compilation | None:
        """What was compiled since; None where nothing was, or where somebody reset dynamo in between."""
        seconds, entries = _books()
        before, entries_before = self._before
        since = seconds[len(before) :]
        if not since or seconds[: len(before)] != before:
            return None
        # By object: dynamo numbers its compilations anew after a reset.
        known = {id(each) for each in entries_before}
        recompiles = sum(bool(each.recompile_reason) for each in entries if id(each) not in known)
        return Compilation(sum(since), len(since), recompiles)


def _books() -> tuple[list[float], list[Any]]:
    """Seconds of each compilation of this process, and the newest entries of dynamo's, which it keeps some of."""
    if "torch._dynamo" not in sys.modules:
        return [], []
    from torch._dynamo import utils

    return list(utils.compilation_time_metrics.get(INNER, ())), list(utils.get_compilation_metrics())
