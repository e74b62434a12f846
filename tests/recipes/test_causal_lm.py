import json
import math
from pathlib import Path

import pytest
import torch

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.registry import default_config, make_task
from kpt_lightning.recipes.task import Task


def task_for(folder: Path, recipe: str = "causal-lm-full", **changes: object) -> Task:
    changes = {"steps": 2, "held_out_batches": 2, "data": {"sequence_length": 32}} | changes
    return make_task(default_config(recipe, model=str(folder), **changes), lambda line: None)


def test_loss_is_the_mean_cross_entropy_of_the_next_token_that_is_learned(byte_folder: Path) -> None:
    task = task_for(byte_folder)
    batch = task.collate([task.held_out[0], task.held_out[1]])
    logits = task.model.eval()(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(task.loss(task.model, batch), expected)
    assert expected.item() == pytest.approx(math.log(258), abs=0.3)
    with torch.no_grad():
        total, weight = task.metrics(task.model, batch)["loss"]
    assert total / weight == pytest.approx(expected.item(), rel=1e-5)
    assert weight == float((batch["labels"][:, 1:] != -100).sum())
    assert task.count(batch) == 64


def test_accuracy_counts_the_likeliest_token(byte_folder: Path) -> None:
    task = task_for(byte_folder)
    batch = task.collate([task.held_out[0]])
    with torch.no_grad():
        likeliest = task.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(-1)
        batch["labels"][:, 1:] = likeliest[:, :-1]
        batch["labels"][:, 1:6] = 0
        right, weight = task.metrics(task.model, batch)["accuracy"]
    assert weight == 31
    assert right == 31 - int((likeliest[0, :5] != 0).sum())


@pytest.mark.parametrize("packing", [True, False])
def test_no_more_rows_are_tokenized_than_the_run_uses(byte_folder: Path, packing: bool) -> None:
    task = task_for(byte_folder, gradient_accumulation=3, data={"sequence_length": 32, "packing": packing})
    assert len(task.train) == 2 * 3 * 2
    assert len(task.held_out) == 2 * 2


def test_own_lines_are_read(byte_folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{number} and {number}?", "answer": str(2 * number)}) for number in range(40)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(lines))
    data = {"source": str(source), "prompt": "question", "completion": "answer", "sequence_length": 32, "held_out": 0.3}
    config = default_config("causal-lm-lora", model=str(byte_folder), steps=2).model_dump(exclude_unset=True)
    task = make_task(type(default_config("causal-lm-lora")).build(config | {"data": data}), lambda line: None)
    labels = task.train[0]["labels"]
    assert 0 < int((labels != -100).sum()) < len(labels)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"label": "stars"}}, "data.label='stars': would be ignored: 'causal-lm-full' does not read it"),
        ({"model": "no/such-model"}, "model='no/such-model': transformers cannot load it: .*Known here: smollm2-135m"),
        ({"data": {"source": "digits"}}, "data.source='digits': holds images"),
    ],
    ids=["label", "model", "images"],
)
def test_what_does_not_fit_is_refused(
    byte_folder: Path, changes: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=said):
        make_task(default_config("causal-lm-full", **({"model": str(byte_folder)} | changes)), lambda line: None)
