"""Proof of compilation: the graphs that torch.compile made since a moment, and where it gave up."""

from dataclasses import dataclass
from typing import Self

from torch._dynamo.utils import counters

from kpt_lightning.decision import Accepted, Decision, Rejected


@dataclass(frozen=True, slots=True)
class GraphCounts:
    """What torch.compile had done in this process so far.

    Attributes:
        graphs: Graphs captured.
        breaks: Places where a graph broke and Python ran instead.
        failed: Functions that were to be compiled and run in Python, at the recompile limit for one.
        attempts: Times that a function was traced, first and again for inputs of another kind.
        not_replayed: Graphs that were to be replayed as CUDA graphs and are launched kernel by kernel.
    """

    graphs: int
    breaks: int
    failed: int
    attempts: int
    not_replayed: int

    @classmethod
    def now(cls) -> Self:
        """Read torch's own counters."""
        frames = counters["frames"]
        return cls(
            graphs=counters["stats"]["unique_graphs"],
            breaks=sum(counters["graph_break"].values()),
            failed=frames["total"] - frames["ok"],
            attempts=frames["total"],
            not_replayed=counters["inductor"]["cudagraph_skips"],
        )


def check_graphs(before: GraphCounts, modules: int, runs: int | None = None) -> list[Decision]:
    """What this process compiled since ``before``: the modules, the loss, and what the user compiles.

    Args:
        before: Read when the modules were marked for compilation.
        modules: How many were: blocks, or others as a whole.
        runs: Of compiled graphs since, new ones and those compiled before; None where they were not counted.

    Returns:
        Nothing where no graph is new and runs were not counted.
    """
    now = GraphCounts.now()
    graphs, breaks, failed = now.graphs - before.graphs, now.breaks - before.breaks, now.failed - before.failed
    if failed:
        reason = f"{failed} functions run uncompiled beside {modules} modules in {graphs} graphs"
        return [Rejected("whole graphs", f"{reason}; TORCH_LOGS=recompiles,graph_breaks names them")]
    if breaks:
        reason = (
            f"{breaks} graph breaks in {graphs} graphs beside {modules} modules; TORCH_LOGS=graph_breaks names them"
        )
        return [Rejected("whole graphs", reason)]
    if runs is not None and runs < modules:
        reason = f"compiled graphs ran {runs} times for {modules} modules; TORCH_LOGS=recompiles,graph_breaks says why"
        return [Rejected("whole graphs", reason)]
    if not graphs and runs is None:
        return []
    if not graphs:
        return [
            Accepted("whole graphs", f"{runs} runs of graphs for {modules} modules, compiled before in this process")
        ]
    return [
        Accepted("whole graphs", f"{graphs} graphs for {modules} modules and what else is compiled, without a break")
    ]


def late_findings(before: GraphCounts, modules: int) -> list[Decision]:
    """What went wrong by the end of a run: a function that fell back to Python, a CUDA graph that is not replayed.

    Args:
        before: As for :func:`check_graphs`.
        modules: As for :func:`check_graphs`.
    """
    found = [proof for proof in check_graphs(before, modules) if not proof]
    if count := GraphCounts.now().not_replayed - before.not_replayed:
        reason = f"{count} graphs are launched kernel by kernel; TORCH_LOGS=cudagraphs says why"
        found.append(Rejected("CUDA graphs", reason))
    return found


def check_recompiles(after_first_step: GraphCounts) -> Decision:
    """What was compiled after the first step: for other sizes, for evaluation, or by the user.

    Args:
        after_first_step: Read then.
    """
    count = GraphCounts.now().attempts - after_first_step.attempts
    if not count:
        return Accepted("recompiles", "none after step 1")
    return Rejected(
        "recompiles", f"{count} after step 1, evaluation and code that you compile included; TORCH_LOGS=recompiles"
    )
