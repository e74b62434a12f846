from typing import TYPE_CHECKING, Any

import pytest

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes import chat, smollm2
from kpt_lightning.recipes.spans import NOT_LEARNED, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PLAIN = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for message in messages %}[{{ message['role'] }}]{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}{% else %}{{ message['content'] }}<|end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}[{{ message['role'] }}]{% if loop.last %}{{ message['content'] }}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def turns(*said: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(said)]


def learned(document: Document, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The stretches of text that are learned."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(document.input_ids, document.labels, strict=True):
        assert label in (token, NOT_LEARNED)
        if label != NOT_LEARNED:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


@pytest.fixture(scope="module")
def smollm2_tokenizer() -> "PreTrainedTokenizerBase":
    if not smollm2.SMOLLM2.available():
        pytest.skip(smollm2.SMOLLM2.available().reason)
    return smollm2.load_tokenizer()


def test_smollm2_learns_its_answers_with_their_end_and_nothing_else(
    smollm2_tokenizer: "PreTrainedTokenizerBase",
) -> None:
    messages = turns("Capital of France?", "Paris.", "<|im_start|>assistant\nof Italy?", "\nRome, I think.\n")
    document = chat.conversation(messages, smollm2_tokenizer, "row 1")
    whole = smollm2_tokenizer.apply_chat_template(messages)["input_ids"]
    assert document.input_ids == list(whole)
    # A line break in front of an answer melts into that of the template, and is learned with it.
    first, second = learned(document, smollm2_tokenizer)
    assert first == "Paris.<|im_end|>"
    assert second.lstrip() == "Rome, I think.\n<|im_end|>"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_marks_of_the_template_and_its_prefixes_say_the_same(
    template: str, byte_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    byte_tokenizer.chat_template = template
    document = chat.conversation(turns("née?", "ja, né", "and?", "no"), byte_tokenizer, "row 1")
    assert learned(document, byte_tokenizer) == ["ja, né<|end|>", "no<|end|>"]


def test_an_open_question_at_the_end_is_not_learned(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    byte_tokenizer.chat_template = PLAIN
    document = chat.conversation(turns("a", "b", "c"), byte_tokenizer, "row 1")
    assert learned(document, byte_tokenizer) == ["b<|end|>"]


def test_a_template_that_forgets_earlier_answers_is_refused_where_it_matters(
    byte_tokenizer: "PreTrainedTokenizerFast",
) -> None:
    byte_tokenizer.chat_template = FORGETFUL
    with pytest.raises(ConfigError, match=r"renders message 2 of row 7 differently once more is said\. Mark the ans"):
        chat.conversation(turns("a", "b", "c", "d"), byte_tokenizer, "row 7")


def test_what_the_template_refuses_carries_its_words(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    byte_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match=r"refuses row 3: roles must alternate"):
        chat.conversation(turns("a", "b"), byte_tokenizer, "row 3")


def test_without_a_template_the_way_out_is_named(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    with pytest.raises(ConfigError, match=r"has no chat template\. Take a chat model, set tokenizer\.chat_template"):
        chat.require_chat_template(byte_tokenizer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r"row 5 is no list of messages"),
        (["hello"], r"row 5 is no list of messages"),
        ([{"role": "user"}], r"message 1 of row 5 has no text in 'content'"),
        ([*turns("a"), {"role": "assistant", "content": ["b"]}], r"message 2 of row 5 has no text in 'content'"),
        ([{"from": "user", "content": "a"}], r"message 1 of row 5 has no text in 'role'"),
        (turns("a"), r"in row 5 no assistant answers"),
        ([{"role": "assistant", "content": "a"}], r"in row 5 no assistant answers"),
        ([], r"in row 5 no assistant answers"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chat.check_messages(messages, "row 5")
