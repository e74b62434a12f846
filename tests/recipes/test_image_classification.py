import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

from kpt_lightning import optional
from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes import digits, image_classification, image_preparation
from kpt_lightning.recipes.lightning_run import fine_tune
from kpt_lightning.recipes.registry import default_config, make_task

pytestmark = pytest.mark.skipif(not optional.SCIKIT_LEARN.available(), reason="scikit-learn is not installed")

needs_image_library = pytest.mark.skipif(
    util.find_spec("PIL") is None and util.find_spec("torchvision") is None,
    reason="transformers' image processors need pillow or torchvision, and neither is installed",
)


def quiet(line: object) -> None:
    """Nothing is printed."""


def test_training_reads_unseen_hands_and_plain_transformers_loads_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    # A third of the recipe's steps, which reach 0.92 or more.
    config = default_config("image-classification", steps=100, output=tmp_path / "out")
    result = fine_tune(config, strategy="auto", say=quiet)
    assert result.before["accuracy"] < 0.3
    assert result.after["accuracy"] > 0.75
    assert result.after["macro_f1"] > 0.75
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label[7] == "7"
    _, held_out = digits.split(digits.read_digits(), 0.1)
    pixels = image_preparation.of_model(str(tmp_path / "out"))(held_out.images)
    with torch.no_grad():
        logits, trained = model(pixel_values=pixels).logits, result.model.eval()(pixel_values=pixels).logits
    assert torch.equal(logits, trained)
    right = (logits.argmax(-1) == held_out.labels).float().mean()
    assert float(right) == pytest.approx(result.after["accuracy"])


def test_batches_are_float32_images_between_minus_one_and_one() -> None:
    task = make_task(default_config("image-classification"), quiet)
    batch = task.collate([task.train[index] for index in range(5)])
    assert batch["pixel_values"].shape == (5, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert (float(batch["pixel_values"].min()), float(batch["pixel_values"].max())) == (-1.0, 1.0)
    assert batch["labels"].shape == (5,)
    assert task.count(batch) == 5


def test_pretrained_folder_gets_a_new_head_and_its_own_image_size(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    settings = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    ViTForImageClassification(settings).save_pretrained(tmp_path)
    image_preparation.for_size(16).save_pretrained(tmp_path)
    said: list[object] = []
    task = make_task(default_config("image-classification", model=str(tmp_path)), said.append)
    batch = task.collate([task.train[0], task.train[1]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert task.model(**batch).logits.shape == (2, 10)
    assert any("classifier.weight" in str(line) for line in said)


@needs_image_library
@pytest.mark.parametrize("size", [8, 32])
def test_image_processor_of_transformers_does_the_same(tmp_path: Path, size: int) -> None:
    from transformers import AutoImageProcessor

    prepare = image_preparation.for_size(size)
    prepare.save_pretrained(tmp_path)
    images = digits.read_digits().images[:4]
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(list(images.numpy()), return_tensors="pt")["pixel_values"]
    # One of 255 levels: resizing rounds differently from library to library.
    assert torch.allclose(prepare(images), theirs, atol=2 / 255 + 1e-6)


def test_exported_image_settings_are_those_that_were_used(tmp_path: Path) -> None:
    image_preparation.for_size(8).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "ViTImageProcessor"
    assert settings["size"] == {"height": 8, "width": 8}
    assert image_preparation.of_model(str(tmp_path)).settings == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": True}, "images are not cropped here"),
        ({"size": {"shortest_edge": 8}}, "no height and width"),
        ({"resample": 1}, "resample=1: it is not known here"),
    ],
)
def test_image_settings_that_would_be_ignored_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        image_preparation.ImagePreparation({**image_preparation.for_size(8).settings, **change})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"source": "movie-reviews"}}, r"data.source='movie-reviews': 'image-classification' reads digits"),
        ({"data": {"held_out": "some.jsonl"}}, r"data.held_out='some.jsonl': no images are read from there"),
        ({"data": {"label": "digit"}}, r"data.label='digit': would be ignored"),
        ({"model": "/no/such/folder"}, r"model='/no/such/folder': has no preprocessor_config.json"),
    ],
)
def test_config_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(default_config("image-classification", **changes), quiet)


def test_new_model_has_five_tokens_for_an_image() -> None:
    model = image_classification.new_model()
    hidden = model(pixel_values=torch.zeros(1, 3, 8, 8), output_hidden_states=True).hidden_states
    assert hidden[0].shape == (1, 5, 64)
    assert sum(parameter.numel() for parameter in model.parameters()) == 71_242
