from typing import TYPE_CHECKING, Any

import pytest

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.spans import NOT_LEARNED, Document, learned_spans
from kpt_lightning.recipes.tokens import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def documents(rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> Documents:
    return Documents(rows, DataConfig(source="rows.jsonl", **settings), tokenizer)


def text_of(document: Document, tokenizer: Any) -> str:
    return str(tokenizer.decode(document.input_ids))


def test_each_text_begins_and_ends_as_the_tokenizer_says(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    made = documents([{"text": f"text {index}"} for index in range(70)], byte_tokenizer)
    result = list(made)
    assert [text_of(each, byte_tokenizer) for each in result] == [f"<|begin|>text {n}<|end|>" for n in range(70)]
    assert all(each.labels == each.input_ids for each in result)
    assert (made.counts.rows, made.counts.documents, made.counts.shortened) == (70, 70, 0)


def test_a_long_text_is_cut_into_pieces_and_a_last_token_alone_is_left_out(
    byte_tokenizer: "PreTrainedTokenizerFast",
) -> None:
    # With begin and end: 9 tokens, of which the last stands alone.
    made = documents([{"text": "abcdefg"}], byte_tokenizer, sequence_length=4)
    assert [text_of(each, byte_tokenizer) for each in made] == ["<|begin|>abc", "defg"]
    assert (made.counts.documents, made.counts.shortened, made.counts.nothing_to_learn) == (2, 0, 1)


def test_only_so_many_pieces_are_kept_of_a_document(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    made = documents(
        [{"text": "abcdefghijk"}, {"text": "xyz"}], byte_tokenizer, sequence_length=5, pieces_per_document=1
    )
    assert [text_of(each, byte_tokenizer) for each in made] == ["<|begin|>abcd", "<|begin|>xyz<|end|>"]
    assert made.counts.shortened == 1


@pytest.mark.parametrize(
    ("prompt", "completion"), [("2+2=", "4"), ("Capital? ", "Rome, né"), ("é", "🙂"), ("", "all of it")]
)
def test_only_the_completion_and_its_end_are_learned(
    prompt: str, completion: str, byte_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    rows = [{"question": prompt, "answer": completion}]
    (document,) = documents(rows, byte_tokenizer, prompt="question", completion="answer")
    assert text_of(document, byte_tokenizer) == f"<|begin|>{prompt}{completion}<|end|>"
    learned = [label for label in document.labels if label != NOT_LEARNED]
    assert learned == document.input_ids[-len(learned) :]
    assert byte_tokenizer.decode(learned) == f"{completion}<|end|>"


def test_an_answer_beyond_the_length_is_left_out_and_counted(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    rows = [{"q": "a long question", "a": "no"}, {"q": "short", "a": "yes, it is long"}, {"q": "s", "a": "y"}]
    made = documents(rows, byte_tokenizer, prompt="q", completion="a", sequence_length=12)
    assert [text_of(each, byte_tokenizer) for each in made] == ["<|begin|>shortyes, i", "<|begin|>sy<|end|>"]
    assert (made.counts.rows, made.counts.documents, made.counts.shortened) == (3, 2, 2)
    assert made.counts.nothing_to_learn == 1


def test_conversations_come_in_the_template(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    byte_tokenizer.chat_template = CHAT
    rows = [{"turns": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}]
    (document,) = documents(rows, byte_tokenizer, messages="turns")
    assert text_of(document, byte_tokenizer) == "u:hi<|end|>a:yo<|end|>"
    assert byte_tokenizer.decode([label for label in document.labels if label != NOT_LEARNED]) == "yo<|end|>"


def test_a_faulty_conversation_is_refused_before_any_is_tokenized(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    byte_tokenizer.chat_template = CHAT
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    with pytest.raises(ConfigError, match=r"row .*hello.* of rows\.jsonl no assistant answers"):
        documents(
            [{"turns": good}, {"turns": [{"role": "user", "content": "hello"}]}], byte_tokenizer, messages="turns"
        )


def test_a_tokenizer_without_an_end_of_text_is_refused(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    byte_tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"no token for the end of a text\. Set tokenizer\.eos_token"):
        documents([{"text": "a"}], byte_tokenizer)


def test_an_end_that_the_tokenizer_writes_itself_stands_once(byte_tokenizer: "PreTrainedTokenizerFast") -> None:
    (document,) = documents([{"text": "a<|end|>"}], byte_tokenizer)
    assert document.input_ids.count(byte_tokenizer.eos_token_id) == 1


def test_a_token_that_holds_a_character_of_the_span_is_learned() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # "is Paris" after a prompt with a space at its end: the token of the answer begins in the prompt.
    vocabulary = {"is": 0, "\u0120Paris": 1, "?": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    document = learned_spans("is Paris", [(3, 8)], fast, special_tokens=False)
    assert document == Document([0, 1], [NOT_LEARNED, 1])
