"""Tokens of a text of which only some stretches are learned."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kpt_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_LEARNED = -100
"""The label that torch's cross-entropy ignores by default, and transformers uses."""

Span = tuple[int, int]
"""First character, and the one behind the last."""


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that belong together.

    Attributes:
        input_ids: Token ids.
        labels: The same ids where they are learned, ``NOT_LEARNED`` elsewhere; equally long, not shifted.
    """

    input_ids: list[int]
    labels: list[int]


def learned_spans(
    text: str, spans: Iterable[Span], tokenizer: "PreTrainedTokenizerBase", *, special_tokens: bool
) -> Document:
    """Tokens of a text; a token is learned where it holds a character of a span.

    Args:
        text: All of it.
        spans: What is learned.
        tokenizer: One that knows the place of its tokens.
        special_tokens: Whether the tokenizer puts its own in front, such as a beginning-of-text token.

    Raises:
        ConfigError: The tokenizer does not know the place of its tokens.
    """
    if not tokenizer.is_fast:
        rule = "it does not tell which characters a token stands for, so nothing says which tokens are learned"
        raise ConfigError("model", type(tokenizer).__name__, rule, "Use a tokenizer with a tokenizer.json file")
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True, verbose=False)
    ids, places = list(encoded["input_ids"]), encoded["offset_mapping"]
    spans = list(spans)
    learned = [any(start < end and start < last and end > first for first, last in spans) for start, end in places]
    return Document(ids, [token if is_learned else NOT_LEARNED for token, is_learned in zip(ids, learned, strict=True)])
