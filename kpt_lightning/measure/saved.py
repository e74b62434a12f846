"""Memory of one training pass, on any device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def peak_of(run: Callable[[], object], device: torch.device) -> int | None:
    """Peak of allocated bytes during ``run``: CUDA's allocator tells; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes of all tensors that one forward pass keeps for its backward pass, weights included, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Any:
        for part in _parts(tensor.detach()):
            storage = part.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(sizes.values())


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors with memory of their own that a sparse one is made of."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)
