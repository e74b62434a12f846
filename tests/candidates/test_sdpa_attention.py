"""Eager attention of transformers becomes torch's, with the same numbers, and comes back exactly."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kpt_lightning.attention.observe import observe_attention
from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.sdpa_attention import CANDIDATE
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 96, "num_key_value_heads": 2, "pad_token_id": 0, **SMALL}
IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
TOKENS = {"input_ids": IDS, "labels": IDS}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 96, **GPT2_NO_DROPOUT}
VIT = {"image_size": 32, "patch_size": 8, **SMALL, **NO_DROPOUT}

MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, TOKENS),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 16}, TOKENS),
    "mistral": ("MistralForCausalLM", "MistralConfig", TEXT, TOKENS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**TEXT, "head_dim": 16}, TOKENS),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, TOKENS),
    "bert": ("BertForMaskedLM", "BertConfig", {"vocab_size": 96, **SMALL, **NO_DROPOUT}, TOKENS),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, PIXELS),
}


def build(name: str, attention: str = "eager", **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    model, config, settings, batch = MODELS[name]
    torch.manual_seed(0)
    built = getattr(transformers, config)(**{**settings, **changes}, attn_implementation=attention)
    return getattr(transformers, model)(built).double(), {
        key: each.double() if each.is_floating_point() else each for key, each in batch.items()
    }


def subject(model: nn.Module) -> Subject:
    return Subject(model=model, profile=detect(), config=KptConfig(), device=torch.device("cpu"))


def results(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    loss = model(**batch).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def reason(model: nn.Module) -> str:
    (only,) = CANDIDATE.applies(subject(model))
    assert isinstance(only, Rejected)
    return only.reason


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_fused_with_the_same_numbers_and_undo_is_exact(name: str) -> None:
    model, batch = build(name)
    exact = results(model, batch)
    before = [dict(vars(module.config)) for module in model.modules() if hasattr(module, "config")]
    on = subject(model)
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change)
    assert observe_attention(lambda: model(**batch)) == []
    applied = CANDIDATE.apply(on, Change.from_dict(change.to_dict()).setting)
    assert len(observe_attention(lambda: model(**batch))) == 2
    for one, other in zip(results(model, batch), exact, strict=True):
        # Eager attention takes its softmax in float32, whatever the dtype.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert copy.deepcopy(model).config is not model.config
    CANDIDATE.undo(on, applied)
    assert [dict(vars(module.config)) for module in model.modules() if hasattr(module, "config")] == before
    for one, other in zip(results(model, batch), exact, strict=True):
        assert torch.equal(one, other)


def test_a_model_inside_another_module_is_found_by_its_name() -> None:
    model, _ = build("llama")
    (change,) = CANDIDATE.applies(subject(nn.ModuleDict({"net": model})))
    assert isinstance(change, Change)
    assert change.setting == {"modules": ["net"]}


def test_fused_attention_stays() -> None:
    assert reason(build("llama", "sdpa")[0]) == "attention is 'sdpa' already"
    assert "no transformers model" in reason(nn.Linear(2, 2))


def test_capped_scores_and_returned_weights_are_declined_with_the_setting_that_says_so() -> None:
    gemma2 = transformers.Gemma2Config(**TEXT, head_dim=16, attn_implementation="eager")
    assert "attn_logit_softcapping" in reason(transformers.Gemma2ForCausalLM(gemma2))
    assert "output_attentions" in reason(build("bert", output_attentions=True)[0])


def test_a_model_without_fused_attention_is_declined_by_name() -> None:
    settings = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
    model = transformers.LongT5ForConditionalGeneration(
        transformers.LongT5Config(**settings, attn_implementation="eager", pad_token_id=0, decoder_start_token_id=0)
    )
    assert reason(model) == "transformers has no fused attention for LongT5ForConditionalGeneration"


def test_a_plan_of_another_model_is_refused_and_nothing_stays_changed() -> None:
    model, _ = build("llama")
    with pytest.raises(ConfigError, match="is no transformers model here"):
        CANDIDATE.apply(subject(model), {"modules": ["", "nowhere"]})
    assert model.config._attn_implementation == "eager"
