"""Several linear layers of one input as one matrix product: the first called computes all, the others take their part.

Each keeps its own Parameters, which are laid together anew in each forward pass. Gradients are views of one matrix.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Seat:
    """What one layer of a group holds. Members are the layers of the group in the order in which they are called."""

    def __init__(self, members: list[nn.Linear], position: int) -> None:
        """One for each member, all with the same list."""
        self.members, self.position = members, position
        # The input and this layer's part of the output, between the first layer's call and this one's.
        self.kept: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept: a copy of the model is no part of this forward pass."""
        return {**vars(self), "kept": None}


def merged_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """The forward function of a member: ``input W^T + b``; on another input than the first layer's by itself."""
    seat: Seat = self.kpt_settings  # type: ignore[assignment]
    if seat.position == 0:
        return _all(seat.members, input)
    kept, seat.kept = seat.kept, None
    if kept is not None and kept[0] is input:
        return kept[1]
    return F.linear(input, self.weight, self.bias)


def _all(members: list[nn.Linear], input: Tensor) -> Tensor:
    weights: list[Tensor] = [each.weight for each in members]
    biases: list[Tensor | None] = [each.bias for each in members]
    if torch.is_autocast_enabled(input.device.type):
        # Before they are laid together: half of the bytes, and no difference in the numbers.
        dtype = torch.get_autocast_dtype(input.device.type)
        weights, biases = [each.to(dtype) for each in weights], [None if b is None else b.to(dtype) for b in biases]
    given = [each for each in biases if each is not None]
    out = F.linear(input, torch.cat(weights), torch.cat(given) if given else None)
    parts = torch.split(out, [each.out_features for each in members], dim=-1)
    for member, part in zip(members[1:], parts[1:], strict=True):
        seat: Any = member.kpt_settings
        seat.kept = (input, part)
    return parts[0]
