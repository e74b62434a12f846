"""All the way from a data config to rows of tokens for a model that predicts the next one."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.collate import Collate, collate_for
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.held_out import read_parts
from kpt_lightning.recipes.packing import TokenRows, pack, unpacked
from kpt_lightning.recipes.record_files import Row
from kpt_lightning.recipes.tokens import Documents, TokenCounts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the data.

    Attributes:
        rows: What a loader draws from.
        counts: What became of the rows of the source that were read for it.
    """

    rows: TokenRows
    counts: TokenCounts

    def render(self) -> str:
        """One line that says what was read, what was left out, and how much is padding."""
        rows, counts = self.rows, self.counts
        padding = "padded in batches" if rows.padding is None else f"{rows.padding / rows.tokens:.1%} padding"
        parts = [
            f"{len(rows)} rows of {counts.documents} documents",
            f"{rows.tokens} tokens, {rows.learned} learned, {padding}",
        ]
        if counts.shortened:
            parts.append(f"{counts.shortened} documents lost their end")
        if counts.nothing_to_learn:
            parts.append(f"{counts.nothing_to_learn} documents left out, nothing in them to learn")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class TokenData:
    """Both parts of the data.

    Attributes:
        train: What is trained on.
        held_out: What is measured on; no document of it is in ``train``.
        left_out: Rows of the source that were not trained on because they are held out, too.
        config: What was read.
        padding_token: Fills rows.
    """

    train: Part
    held_out: Part
    left_out: int
    config: DataConfig
    padding_token: int

    def collate_for(self, model: nn.Module) -> Collate:
        """Rows to a batch for this model. Raises as :func:`kpt_lightning.recipes.collate.collate_for`."""
        config = self.config
        return collate_for(
            model, packing=config.packing, padding_token=self.padding_token, longest=config.sequence_length
        )

    def render(self) -> str:
        """What was read, a line for each part."""
        text = f"train: {self.train.render()}\nheld out: {self.held_out.render()}"
        same = f"\n{self.left_out} rows are held out, too, and were left out of training" if self.left_out else ""
        return text + same


def read_tokens(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    train_rows: int | None = None,
    held_out_rows: int | None = None,
) -> TokenData:
    """Read, split, tokenize and pack.

    Args:
        config: What to read.
        tokenizer: Of the model.
        train_rows: Stop with so many rows to train on; None takes all that the source gives.
        held_out_rows: Stop with so many held-out rows.

    Returns:
        Rows of the same content and order in every process; whoever draws from them shuffles.

    Raises:
        ConfigError: A source, a column, a row or the tokenizer does not fit; the message says which.
        MissingDependencyError: A package that carries or reads a source is absent.
    """
    parts = read_parts(config)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if padding is None:
        rule = f"the tokenizer {tokenizer.name_or_path!r} has neither a padding token nor one for the end of a text"
        raise ConfigError("model", None, rule, "Set tokenizer.pad_token")
    made = partial(_part, config=config, tokenizer=tokenizer, padding_token=padding)
    train, held_out = made(parts.train, count=train_rows), made(parts.held_out, count=held_out_rows)
    return TokenData(train, held_out, parts.left_out, config, padding)


def _part(
    rows: list[Row], *, config: DataConfig, tokenizer: "PreTrainedTokenizerBase", padding_token: int, count: int | None
) -> Part:
    documents = Documents(rows, config, tokenizer)
    made = (
        pack(documents, config.sequence_length, padding_token, count) if config.packing else unpacked(documents, count)
    )
    if not len(made):
        rule = f"none of {len(rows)} rows gives a token to learn"
        raise ConfigError("data.source", config.source, rule, "Raise data.sequence_length, or correct the rows")
    return Part(made, documents.counts)
