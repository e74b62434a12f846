"""How much work one batch holds: tokens where it holds token ids, else samples."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

TOKEN_KEY = "input_ids"
MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class BatchSize:
    """Work in one batch, of this process.

    Attributes:
        tokens: ``numel`` of the token ids, padding included, None where there are none.
        samples: Length of the first dimension.
        shape: Shape of the tensor that was counted.
    """

    tokens: int | None
    samples: int
    shape: tuple[int, ...]


def batch_size(batch: Any) -> BatchSize | None:
    """Count a batch.

    Tokens are ``numel`` of the first tensor under a key or field ``input_ids`` at any depth, else of the first 2-D
    tensor of int32 or int64. Padding counts, since the device computes it. A batch without such a tensor has samples
    only: the first dimension of its first tensor. Only shapes are read, so a device is never waited for.

    Args:
        batch: Tensors in any nest of mappings (also ``BatchEncoding``), sequences and dataclasses.

    Returns:
        None where the batch holds no tensor with a dimension.
    """
    first = integer = None
    for name, tensor in _tensors(batch, "", 0):
        if name == TOKEN_KEY:
            return _of_tokens(tensor)
        if integer is None and tensor.dim() == 2 and _is_integer(tensor):
            integer = tensor
        if first is None and tensor.dim() > 0:
            first = tensor
    if integer is not None:
        return _of_tokens(integer)
    if first is not None:
        return BatchSize(None, first.shape[0], tuple(first.shape))
    return None


def _of_tokens(tensor: torch.Tensor) -> BatchSize:
    return BatchSize(tensor.numel(), tensor.shape[0] if tensor.dim() else 1, tuple(tensor.shape))


def _is_integer(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


def _tensors(item: Any, name: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(item, torch.Tensor):
        yield name, item
    elif depth >= MAX_DEPTH:
        return
    elif isinstance(item, Mapping):
        for key in item:
            yield from _tensors(item[key], str(key), depth + 1)
    elif isinstance(item, (list, tuple)):
        names = getattr(item, "_fields", None) or ("",) * len(item)
        for field_name, value in zip(names, item, strict=True):
            yield from _tensors(value, field_name, depth + 1)
    elif is_dataclass(item) and not isinstance(item, type):
        for entry in fields(item):
            yield from _tensors(getattr(item, entry.name), entry.name, depth + 1)
