"""Finding out that a weight was written to, without a copy of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ELEMENTS = 32
"""Looked at in each tensor: what updates a weight through ``.data``, as a momentum encoder does, moves all of it."""


def watch(tensors: Sequence[Tensor], *, counters: bool = True) -> Callable[[], Tensor | None]:
    """From now on.

    Args:
        tensors: Any; those made in inference mode are left out.
        counters: A version counter that moved is a write; False where what was written may have been put back.

    Returns:
        Tells the first that was written to since, by its version counter, or by some elements where a write through
        ``.data`` did not move that; None where none was.
    """
    counted = [(each, each._version) for each in tensors if not each.is_inference()]
    looked = [each for each, _ in counted if place(each) is not None]
    before, devices = _bits(looked), [each.device for each in looked]

    def written() -> Tensor | None:
        for each, version in counted:
            if counters and each._version != version:
                return each
        after = _bits(looked)
        same = before.keys() == after.keys() and all(torch.equal(before[device], after[device]) for device in before)
        return None if same else _first_changed(looked, devices, before)

    return written


def _first_changed(
    tensors: Sequence[Tensor], devices: Sequence[torch.device], before: dict[torch.device, Tensor]
) -> Tensor | None:
    """Each looked at again by itself: the devices are those at the start."""
    starts = dict.fromkeys(before, 0)
    for each, device in zip(tensors, devices, strict=True):
        bits = _sample(each).to(device)
        start, starts[device] = starts[device], starts[device] + bits.numel()
        if not torch.equal(before[device][start : starts[device]], bits):
            return each
    return None


def place(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Where its memory begins, equal for two names of one storage; None without memory of its own kind."""
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return None
    pointer = tensor.untyped_storage().data_ptr()
    return (tensor.device, pointer) if pointer else None


def _bits(tensors: Sequence[Tensor]) -> dict[torch.device, Tensor]:
    parts: dict[torch.device, list[Tensor]] = {}
    for each in tensors:
        parts.setdefault(each.device, []).append(_sample(each))
    return {device: torch.cat(samples) for device, samples in parts.items()}


def _sample(tensor: Tensor) -> Tensor:
    """The first element of some rows, in whatever order the memory is, as bytes."""
    plain = tensor.detach()
    rows = plain.reshape(1) if plain.dim() == 0 else plain[:: max(1, plain.shape[0] // _ELEMENTS)]
    first: tuple[Any, ...] = (slice(_ELEMENTS), *(0,) * (rows.dim() - 1))
    # One element counts as contiguous whatever its stride, and cannot be viewed as bytes then.
    return rows[first].clone(memory_format=torch.contiguous_format).view(torch.uint8)
