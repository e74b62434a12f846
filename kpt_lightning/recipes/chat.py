"""Conversations in the model's own chat template; what the assistant says is learned, nothing else."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.spans import NOT_LEARNED, Document, Span, learned_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

# The marker with which a template says itself what the assistant generates.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def require_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ConfigError: With the next step.
    """
    if not isinstance(tokenizer.chat_template, str):
        rule = f"the tokenizer {tokenizer.name_or_path!r} has no chat template"
        step = "Take a chat model, set tokenizer.chat_template, or give columns of prompt and completion"
        raise ConfigError("data.messages", tokenizer.chat_template, rule, step)


def check_messages(messages: object, place: str) -> Sequence[Message]:
    """The messages of a conversation that has something to learn.

    Raises:
        ConfigError: Naming the place and what is wrong there.
    """
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ConfigError("data.messages", messages, f"{place} is no list of messages", _SHAPE)
    for number, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                rule = f"message {number} of {place} has no text in {key!r}"
                raise ConfigError("data.messages", message.get(key), rule, _SHAPE)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:]:
        rule = f"in {place} no assistant answers, so there is nothing to learn"
        raise ConfigError("data.messages", roles, rule, "Remove the row, or name the answering role 'assistant'")
    return messages


_SHAPE = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


def conversation(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", place: str) -> Document:
    """Tokens of one conversation.

    Where the template marks what the assistant generates, its marks count. Otherwise each answer is what the template
    adds to the conversation before it, with the header of an answer, up to and with the token that ends it.

    Args:
        messages: As :func:`check_messages` lets them pass.
        tokenizer: With a chat template.
        place: Where the row came from, for errors.

    Raises:
        ConfigError: The template refuses the roles, or renders an answer differently once more is said.
    """
    template = str(tokenizer.chat_template)
    if _GENERATION.search(template):
        return _by_marks(messages, tokenizer, place)
    text = _rendered(messages, tokenizer, place)
    spans = [
        _answer(text, messages, index, tokenizer, place)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    document = learned_spans(text, spans, tokenizer, special_tokens=False)
    return _up_to_the_end(document, tokenizer.eos_token_id)


def _by_marks(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", place: str) -> Document:
    _rendered(messages, tokenizer, place)
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, marks = list(encoded["input_ids"]), encoded["assistant_masks"]
    return Document(ids, [token if mark else NOT_LEARNED for token, mark in zip(ids, marks, strict=True)])


def _answer(
    text: str, messages: Sequence[Message], index: int, tokenizer: "PreTrainedTokenizerBase", place: str
) -> Span:
    before = _rendered(messages[:index], tokenizer, place, add_generation_prompt=True)
    through = _rendered(messages[: index + 1], tokenizer, place)
    if not (text.startswith(through) and through.startswith(before)):
        rule = f"the chat template renders message {index + 1} of {place} differently once more is said"
        step = "Mark the answers in the template with {% generation %}, or keep one answer, the last message"
        raise ConfigError("data.messages", messages[index]["content"], rule, step)
    return len(before), len(through)


def _rendered(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", place: str, **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError) as error:
        rule = f"the chat template refuses {place}: {error}"
        roles = [message["role"] for message in messages]
        raise ConfigError("data.messages", roles, rule, "Correct the row, or take another model") from error


def _up_to_the_end(document: Document, end: int | None) -> Document:
    """Without what the template writes behind the token that ends an answer: the model never has to say it."""
    labels = list(document.labels)
    behind = False
    for index, label in enumerate(labels):
        if label == NOT_LEARNED:
            behind = False
        elif behind:
            labels[index] = NOT_LEARNED
        elif label == end:
            behind = True
    return Document(document.input_ids, labels)
