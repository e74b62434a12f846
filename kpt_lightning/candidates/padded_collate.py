"""Padding the batches of a language model to a multiple of some length, without an effect on its loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kpt_lightning.errors import KptError

IGNORED = -100
"""The label that ``torch.nn.functional.cross_entropy`` leaves out by default."""

PADDED = ("input_ids", "attention_mask", "labels", "token_type_ids")
"""Keys of a batch whose padding is known."""


@dataclass(frozen=True, slots=True)
class PaddedCollate:
    """A collate function whose batches have fewer different lengths. It can be pickled where the wrapped one can.

    Attributes:
        collate: Makes the batch.
        multiple: Of which the length is made.
        token: Put into ``input_ids``.
        mask: Put into ``attention_mask``; 1 keeps a mask of ones one, where a causal model looks back only.
        longest: Never padded beyond, such as the number of position embeddings; None without such a limit.
    """

    collate: Callable[[Any], Any]
    multiple: int
    token: int
    mask: int
    longest: int | None

    def __call__(self, samples: Any) -> Any:
        """Collate, then pad on the right.

        Raises:
            KptError: A batch holds a tensor over the sequence that cannot be padded.
        """
        return self.pad(self.collate(samples))

    def pad(self, batch: Any) -> Any:
        """The batch itself where it has the right length, else one of its kind."""
        length = batch["input_ids"].shape[1]
        wanted = -(-length // self.multiple) * self.multiple
        if self.longest is not None:
            wanted = max(length, min(wanted, self.longest))
        if wanted == length:
            return batch
        fill = {"input_ids": self.token, "attention_mask": self.mask, "labels": IGNORED, "token_type_ids": 0}
        padded = {}
        for key, value in batch.items():
            if key in fill and over_sequence(value, batch):
                padded[key] = torch.nn.functional.pad(value, (0, wanted - length), value=fill[key])
            elif over_sequence(value, batch):
                raise KptError(f"the batch has {key!r} of the sequence's shape, and how to pad it is not known")
            else:
                padded[key] = value
        return padded if type(batch) is dict else type(batch)(padded)


def over_sequence(value: Any, batch: Mapping[str, Any]) -> bool:
    """Whether a part of a batch has one entry for each token."""
    return isinstance(value, Tensor) and value.shape[:2] == batch["input_ids"].shape
