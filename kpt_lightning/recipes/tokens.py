"""Rows to documents of tokens: plain text, prompts with completions, conversations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.chat import check_messages, conversation, require_chat_template
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.record_files import Row
from kpt_lightning.recipes.spans import NOT_LEARNED, Document, learned_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenizers are threaded over the texts of one call.
TEXTS_AT_ONCE = 32


@dataclass(slots=True)
class TokenCounts:
    """What became of the rows that were read so far.

    Attributes:
        rows: Rows that were tokenized.
        documents: Documents that they gave; a long text gives several.
        shortened: Rows that lost their end, because it did not fit or only the first pieces were wanted.
        nothing_to_learn: Documents that were left out, because no token in them is learned.
    """

    rows: int = 0
    documents: int = 0
    shortened: int = 0
    nothing_to_learn: int = 0


class Documents:
    """The documents of some rows, made while they are asked for: who needs few waits for few."""

    def __init__(self, rows: Sequence[Row], config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Check what can be checked before any text is tokenized.

        Args:
            rows: Checked by :func:`kpt_lightning.recipes.records.check_text`.
            config: Columns and sizes.
            tokenizer: Of the model.

        Raises:
            ConfigError: The tokenizer lacks what the form of the rows needs, or a conversation is none.
        """
        self.rows, self.config, self.tokenizer = rows, config, tokenizer
        self.counts = TokenCounts()
        if config.form == "messages":
            require_chat_template(tokenizer)
            for row in rows:
                check_messages(row[str(config.messages)], _place(row, config))
        else:
            end_of_text(tokenizer)

    def __iter__(self) -> Iterator[Document]:
        """Each at most ``sequence_length`` long, with at least one token that is learned behind its first one."""
        for rows in _batched(self.rows, TEXTS_AT_ONCE):
            for document in self._tokenized(rows):
                self.counts.rows += 1
                yield from self._pieces(document)

    def _tokenized(self, rows: Sequence[Row]) -> Iterator[Document]:
        config, tokenizer = self.config, self.tokenizer
        if config.form == "messages":
            for row in rows:
                yield conversation(row[str(config.messages)], tokenizer, _place(row, config))
        elif config.form == "completion":
            for row in rows:
                yield _completion(row[str(config.prompt)], row[str(config.completion)], tokenizer)
        else:
            for ids in tokenizer([row[config.text] for row in rows], verbose=False)["input_ids"]:
                ended = _ended(list(ids), tokenizer)
                yield Document(ended, ended)

    def _pieces(self, document: Document) -> Iterator[Document]:
        length, total = self.config.sequence_length, len(document.input_ids)
        # The rest of an answer without its question teaches something else.
        wanted = self.config.pieces_per_document if self.config.form == "text" else 1
        ends = range(0, total, length)[:wanted]
        self.counts.shortened += total > len(ends) * length
        for start in ends:
            piece = Document(document.input_ids[start : start + length], document.labels[start : start + length])
            if all(label == NOT_LEARNED for label in piece.labels[1:]):
                self.counts.nothing_to_learn += 1
                continue
            self.counts.documents += 1
            yield piece


def end_of_text(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that is put behind each document.

    Raises:
        ConfigError: There is none.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        rule = f"the tokenizer {tokenizer.name_or_path!r} has no token for the end of a text"
        raise ConfigError(
            "model", tokenizer.eos_token, rule, "Set tokenizer.eos_token, or take a causal language model"
        )
    return tokenizer.eos_token_id


def _ended(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    end = end_of_text(tokenizer)
    # Some tokenizers put it there themselves.
    return ids if ids[-1:] == [end] else [*ids, end]


def _completion(prompt: str, completion: str, tokenizer: "PreTrainedTokenizerBase") -> Document:
    text = prompt + completion
    document = learned_spans(text, [(len(prompt), len(text))], tokenizer, special_tokens=True)
    ids = _ended(document.input_ids, tokenizer)
    return Document(ids, [*document.labels[: len(ids) - 1], ids[-1]])


def _place(row: Row, config: DataConfig) -> str:
    return f"the row {str(row[str(config.messages)])[:60]!r} of {config.source}"


def _batched(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
