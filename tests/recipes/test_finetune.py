from typing import TYPE_CHECKING

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from kpt_lightning.recipes import text
from kpt_lightning.recipes.causal_lm import FineTuneConfig, smollm2_lora
from kpt_lightning.recipes.finetune import FineTuneResult, fine_tune

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TINY = smollm2_lora(steps=12, batch_size=4, sequence_length=64, held_out_sequences=8, learning_rate=1e-2)


def corpus_for(config: FineTuneConfig) -> text.Corpus:
    return text.standard_library(
        lambda source: list(source.encode()),
        0,
        length=config.sequence_length,
        train_sequences=config.steps * config.batch_size,
        held_out_sequences=config.held_out_sequences,
    )


def run(model: "LlamaForCausalLM", *callbacks: Callback) -> FineTuneResult:
    return fine_tune(TINY, model, corpus_for(TINY), strategy="auto", callbacks=callbacks, say=lambda line: None)


def test_held_out_loss_falls_and_every_token_counts(byte_llama: "LlamaForCausalLM") -> None:
    result = run(byte_llama)
    assert result.loss_after < result.loss_before - 0.05
    assert result.tokens == 12 * 4 * 64
    assert result.trainer.global_step == 12


def test_held_out_loss_is_the_mean_over_all_held_out_sequences(byte_llama: "LlamaForCausalLM") -> None:
    tokens = corpus_for(TINY).held_out
    with torch.no_grad():
        expected = byte_llama(input_ids=tokens, labels=tokens).loss.item()
    assert run(byte_llama).loss_before == pytest.approx(expected, rel=1e-5)


def test_frozen_weights_stay_bit_for_bit(byte_llama: "LlamaForCausalLM") -> None:
    before = {name: value.clone() for name, value in byte_llama.state_dict().items()}
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in run(byte_llama).module.model.state_dict().items()
        if "lora_" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_random_state_of_the_user_is_left_alone(byte_llama: "LlamaForCausalLM") -> None:
    before = torch.random.get_rng_state()
    run(byte_llama)
    assert torch.equal(torch.random.get_rng_state(), before)
