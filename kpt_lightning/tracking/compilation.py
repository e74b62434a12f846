"""What torch.compile cost a run: read from dynamo's own books, which it keeps anyway."""

import sys
from dataclasses import dataclass

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
        seconds, recompiles = _books()
        before, recompiled_before = self._before
        since = seconds[len(before) :]
        if not since or seconds[: len(before)] != before:
            return None
        return Compilation(sum(since), len(since), len(recompiles - recompiled_before))


def _books() -> tuple[list[float], frozenset[str]]:
    """Seconds of each compilation of this process, and the ids of the recompilations that dynamo remembers."""
    if "torch._dynamo" not in sys.modules:
        return [], frozenset()
    from torch._dynamo import utils

    ids = frozenset(str(each.compile_id) for each in utils.get_compilation_metrics() if each.recompile_reason)
    return list(utils.compilation_time_metrics.get(INNER, ())), ids
