"""torch's own compiler under a key: code compiled under one key is never run under another. Its runs are counted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class GraphRuns:
    """Forward runs of graphs that :class:`Inductor` compiled, whenever that was.

    Attributes:
        total: How many.
    """

    total: int = 0


_active: list[GraphRuns] = []


@contextmanager
def count_graph_runs() -> Iterator[GraphRuns]:
    """Count every run in this process until the block ends."""
    counts = GraphRuns()
    _active.append(counts)
    try:
        yield counts
    finally:
        _active[:] = [other for other in _active if other is not counts]


@dataclass(frozen=True, slots=True)
class Inductor:
    """A backend for ``torch.compile``. torch keeps compiled code by function and by equality of backends.

    What a compiled graph froze and does not check again, such as the choice of an attention kernel, can then not
    outlive the change that made it.

    Attributes:
        key: Any text.
        cuda_graphs: Replay what was compiled as a CUDA graph, one for each pass and each size of the inputs; not where
            sizes are symbols. What it returns lies in memory that the next call writes to: see ``cuda_graphs.py``.
    """

    key: str
    cuda_graphs: bool = field(default=False, kw_only=True)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph as ``backend="inductor"`` does."""
        from torch._inductor.compile_fx import compile_fx

        patches = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
        # torch's caches of compiled code on disk know nothing of the key either.
        settings: Any = torch.compiler.config
        with settings.patch(cache_key_tag=f"{settings.cache_key_tag}{self.key}"):
            compiled: Any = compile_fx(graph, list(inputs), config_patches=patches if self.cuda_graphs else None)

        def run(*args: Any) -> Any:
            for counts in _active:
                counts.total += 1
            return compiled(*args)

        return run
