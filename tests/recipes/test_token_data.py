import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.packing import TokenRows
from kpt_lightning.recipes.token_data import read_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture
def source(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"document {index} " + "la " * (index % 7)} for index in range(120)]
    file.write_text("\n".join(map(json.dumps, rows * 2)))
    return str(file)


def texts(rows: TokenRows, tokenizer: Any) -> set[str]:
    """The documents of packed rows."""
    found = set()
    for row in rows.rows:
        borders = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), len(row["position_ids"])]
        parts = [tokenizer.decode(row["input_ids"][start:end]) for start, end in pairwise(borders)]
        found |= {part for part in parts if part.startswith("<|begin|>")}
    return found


def test_no_held_out_document_is_among_the_packed_training_rows(
    source: str, byte_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    data = read_tokens(DataConfig(source=source, held_out=0.2, sequence_length=64), byte_tokenizer)
    train, held_out = texts(data.train.rows, byte_tokenizer), texts(data.held_out.rows, byte_tokenizer)
    assert not train & held_out
    assert len(train | held_out) == 120
    assert data.train.counts.documents + data.held_out.counts.documents == 240


def test_report_says_what_was_read_left_out_and_padded(tmp_path: Path, byte_tokenizer: Any) -> None:
    (tmp_path / "train.txt").write_text("one\n" * 3 + "a line that is far too long\nshort\nheld\n")
    (tmp_path / "test.txt").write_text("held\n")
    config = DataConfig(
        source=str(tmp_path / "train.txt"), held_out=str(tmp_path / "test.txt"), sample_by="line", sequence_length=10,
        pieces_per_document=1,
    )  # fmt: skip
    assert read_tokens(config, byte_tokenizer).render() == (
        "train: 4 rows of 5 documents; 40 tokens, 27 learned, 20.0% padding; 1 documents lost their end\n"
        "held out: 1 rows of 1 documents; 10 tokens, 5 learned, 40.0% padding\n"
        "1 rows are held out, too, and were left out of training"
    )


def test_without_packing_the_report_claims_no_padding(source: str, byte_tokenizer: Any) -> None:
    config = DataConfig(source=source, sequence_length=64, packing=False)
    assert read_tokens(config, byte_tokenizer, held_out_rows=3).held_out.render().endswith("learned, padded in batches")


def test_two_reads_give_the_same_rows_and_no_more_than_wanted(
    source: str, byte_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    config = DataConfig(source=source, sequence_length=64)
    one, two = (read_tokens(config, byte_tokenizer, train_rows=5, held_out_rows=2) for _ in range(2))
    assert (len(one.train.rows), len(one.held_out.rows)) == (5, 2)
    assert all(
        torch.equal(a[name], b[name])
        for a, b in zip(one.train.rows.rows, two.train.rows.rows, strict=True)
        for name in a
    )


@pytest.mark.parametrize("packing", [True, False])
def test_a_tiny_language_model_learns_from_the_batches(
    packing: bool, source: str, byte_tokenizer: "PreTrainedTokenizerFast"
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    data = read_tokens(DataConfig(source=source, sequence_length=64, packing=packing), byte_tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(byte_tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                use_cache=False,
            )
        )
    collate = data.collate_for(model)
    loader = torch.utils.data.DataLoader(data.train.rows, batch_size=8, collate_fn=collate)
    held_out = collate(data.held_out.rows.rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    before = model(**held_out).loss.item()
    for _ in range(3):
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    # 258 tokens at random are 5.55 nats; ten digits and "la" repeated need far fewer.
    assert before > 5
    assert model(**held_out).loss.item() < 3


def test_rows_that_give_nothing_to_learn_are_refused(tmp_path: Path, byte_tokenizer: Any) -> None:
    rows = [{"q": f"question number {index}", "a": "yes"} for index in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(source=str(tmp_path / "rows.jsonl"), prompt="q", completion="a", sequence_length=8)
    with pytest.raises(ConfigError, match=r"none of \d+ rows gives a token to learn\. Raise data\.sequence_length"):
        read_tokens(config, byte_tokenizer)


def test_padding_takes_the_token_of_the_tokenizer_and_else_the_end_of_text(source: str, byte_tokenizer: Any) -> None:
    config = DataConfig(source=source)
    assert (
        read_tokens(config, byte_tokenizer, train_rows=1, held_out_rows=1).padding_token == byte_tokenizer.eos_token_id
    )
    byte_tokenizer.pad_token = "a"
    assert (
        read_tokens(config, byte_tokenizer, train_rows=1, held_out_rows=1).padding_token == byte_tokenizer.pad_token_id
    )
