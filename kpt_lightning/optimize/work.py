"""What a trial runs: a forward pass on a real batch, in a plain loop or inside of a trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Work(Protocol):
    """One unit of training work; ``validation.workload.Workload`` is one.

    Attributes:
        batch: Any pytree, on the device.
    """

    batch: Any

    def loss(self) -> Tensor:
        """One forward pass: a scalar with its graph."""
        ...

    def loss_and_outputs(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Likewise, with the floating-point outputs of the model by place, where they can be seen."""
        ...


@contextmanager
def resampled(work: Work, seed: int) -> Iterator[None]:
    """Let ``work`` run on rows drawn with replacement from its batch; a batch of one row, or of none, stays."""
    before = work.batch
    work.batch = resample(before, seed)
    try:
        yield
    finally:
        work.batch = before


def resample(batch: Any, seed: int) -> Any:
    """Rows of a batch drawn with replacement, the same ones in every tensor that has as many rows as the first."""
    leaves, spec = tree_flatten(batch)
    rows = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0), 0)
    if rows < 2:
        return batch
    order = torch.randint(0, rows, (rows,), generator=torch.Generator().manual_seed(seed))

    def drawn(leaf: Any) -> Any:
        fits = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows
        return leaf.index_select(0, order.to(leaf.device)) if fits else leaf

    return tree_unflatten([drawn(leaf) for leaf in leaves], spec)
