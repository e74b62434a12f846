"""Rows of tokens to a batch, in the layout that a model's attention keeps documents apart in."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import Parameter, signature

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.spans import NOT_LEARNED

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Batch]], Batch]

MULTIPLE = 16
"""Padded rows are a multiple of this long: an FP8 matrix product needs it of each of its dimensions."""


def rows(batch: Sequence[Batch]) -> Batch:
    """Packed rows under each other: ``input_ids``, ``labels`` and ``position_ids`` of shape ``(rows, length)``."""
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def one_row(batch: Sequence[Batch]) -> Batch:
    """Packed rows behind each other, shape ``(1, rows * length)``.

    Flash attention of transformers reads the borders of documents from the positions of a single row only, and then
    computes no pair of tokens that no document has.
    """
    return {name: torch.cat([row[name] for row in batch])[None] for name in batch[0]}


def padded(batch: Sequence[Batch], *, padding_token: int, longest: int) -> Batch:
    """One document a row, with ``attention_mask``, padded on the right.

    Args:
        batch: With ``input_ids`` and ``labels``.
        padding_token: Fills ``input_ids``.
        longest: No row is padded beyond it.

    Returns:
        Tensors of shape ``(rows, length)``, int64.
    """
    length = max(len(row["input_ids"]) for row in batch)
    length = max(length, min(longest, -(-length // MULTIPLE) * MULTIPLE))
    filled = {"input_ids": padding_token, "labels": NOT_LEARNED, "attention_mask": 0}
    masked = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in batch]
    result = {}
    for name, value in filled.items():
        grown = pad_sequence([row[name] for row in masked], batch_first=True, padding_value=value)
        result[name] = nn.functional.pad(grown, (0, length - grown.shape[1]), value=value)
    return result


def collate_for(model: nn.Module, *, packing: bool, padding_token: int, longest: int) -> Collate:
    """The layout for this model.

    Args:
        model: On any device, its layers not converted yet; with packing it is run twice, on eight tokens.
        packing: Whether the rows are packed.
        padding_token: As in :func:`padded`.
        longest: As in :func:`padded`.

    Raises:
        ConfigError: The model would let packed documents see each other.
    """
    if not packing:
        return partial(padded, padding_token=padding_token, longest=longest)
    if not (apart := keeps_documents_apart(model)):
        raise ConfigError("data.packing", True, apart.reason, "Set data.packing to false")
    return packed_layout(model)


def packed_layout(model: nn.Module) -> Collate:
    """Packed rows behind each other for flash attention, under each other for any other."""
    return one_row if "flash" in _attention(model) else rows


def keeps_documents_apart(model: nn.Module) -> Decision:
    """Whether the second of two packed documents comes out the same whatever the first says. The model is run twice.

    To be asked before layers are converted to FP8: there one scale can be shared by all tokens of a batch.
    """
    taken = signature(model.forward).parameters.values()
    if not any(each.name == "position_ids" or each.kind is Parameter.VAR_KEYWORD for each in taken):
        return Rejected("packing", f"{type(model).__name__} takes no position_ids, which part packed documents")
    device = next(model.parameters()).device
    first = torch.tensor([[1, 1, 1, 1, 2, 3, 4, 5]], device=device)
    other = torch.tensor([[6, 7, 6, 7, 2, 3, 4, 5]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    was_training = model.training
    try:
        # Dropout would make any two runs differ.
        model.eval()
        with torch.no_grad():
            one, two = (model(input_ids=each, position_ids=positions).logits[:, 4:] for each in (first, other))
    finally:
        model.train(was_training)
    if torch.equal(one, two):
        return Accepted("packing", "documents in a row do not see each other")
    return Rejected("packing", f"{type(model).__name__} lets packed documents see each other: {_why(model)}")


def _why(model: nn.Module) -> str:
    if getattr(getattr(model, "config", None), "use_cache", False):
        return "with model.config.use_cache on, transformers does not look at the positions; set it to False"
    return f"its attention, {_attention(model)!r}, does not look at the positions"


def _attention(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None))
