"""Documents joined and cut into rows of one length for an encoder, each with the special tokens of its own."""

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.record_files import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def joined_rows(rows: Sequence[Row], data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> list[Tensor]:
    """Rows without padding, so that no attention mask is needed; what is left at the end is dropped.

    Args:
        rows: Documents, joined in this order.
        data: Names the column and the length.
        tokenizer: With a mask token.

    Returns:
        Token ids, int64, each of shape ``(sequence_length,)``.

    Raises:
        ConfigError: The text is too short for one row, or rows are too short for one word.
    """
    before, after = special_tokens(tokenizer)
    length = data.sequence_length
    room = length - len(before) - len(after)
    if room < 1:
        rule = f"{length - room} of the tokens of a row are special tokens"
        raise ConfigError("data.sequence_length", length, rule, f"Give {length - room + 1} or more")
    limit = None if data.pieces_per_document is None else data.pieces_per_document * room
    texts = [row[data.text] for row in rows]
    documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = list(chain.from_iterable([*document[:limit], *after] for document in documents))
    pieces = [tokens[start : start + room] for start in range(0, len(tokens) - room + 1, room)]
    special = set(tokenizer.all_special_ids)
    kept = [torch.tensor([*before, *piece, *after]) for piece in pieces if not special.issuperset(piece)]
    if not kept:
        rule = f"the {len(rows)} documents of one part give {len(tokens)} tokens, and one row needs {room}"
        raise ConfigError("data.sequence_length", length, rule, "Give a smaller one, or more text")
    return kept


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    ids = list(tokenizer(tokenizer.mask_token)["input_ids"])
    place = ids.index(tokenizer.mask_token_id)
    return ids[:place], ids[place + 1 :]
