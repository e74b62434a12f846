import math
from typing import TYPE_CHECKING

import pytest
import torch

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.causal_lm import LLAMA_LINEARS, CausalLM, FineTuneConfig, add_lora, smollm2_lora

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TINY = smollm2_lora(steps=4, batch_size=2, sequence_length=16, held_out_sequences=2, warmup_steps=1, lora_rank=2)


def test_recipe_is_a_full_config_and_takes_changes() -> None:
    assert isinstance(smollm2_lora(), FineTuneConfig)
    assert (smollm2_lora(steps=7).steps, smollm2_lora(steps=7).lora_rank) == (7, smollm2_lora().lora_rank)


def test_unknown_setting_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"lr=0\.1: it is no setting of this recipe\. Known: steps, batch_size"):
        smollm2_lora(lr=0.1)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": -1}, "batch_size"),
        ({"sequence_length": 1}, "sequence_length"),
        ({"warmup_steps": 40}, "warmup_steps"),
        ({"lora_rank": 0}, "lora_rank"),
    ],
)
def test_impossible_size_names_the_field(changes: dict[str, int], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        smollm2_lora(**changes)
    assert caught.value.field == field


def test_lora_trains_two_matrices_a_linear_layer_and_nothing_else(byte_llama: "LlamaForCausalLM") -> None:
    wanted = sum(
        TINY.lora_rank * sum(module.weight.shape)
        for name, module in byte_llama.named_modules()
        if name.endswith(LLAMA_LINEARS)
    )
    adapted = add_lora(byte_llama, TINY)
    trainable = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert sum(trainable.values()) == wanted


def test_new_adapters_change_no_output(byte_llama: "LlamaForCausalLM") -> None:
    tokens = torch.arange(32).reshape(2, 16)
    before = byte_llama.eval()(input_ids=tokens).logits.detach()
    after = add_lora(byte_llama, TINY).eval()(input_ids=tokens).logits
    torch.testing.assert_close(after, before)


def test_loss_is_the_mean_cross_entropy_of_the_next_token(byte_llama: "LlamaForCausalLM") -> None:
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = byte_llama(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 256), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(CausalLM(byte_llama, TINY).loss(tokens), expected)
    assert expected.item() == pytest.approx(math.log(256), abs=0.2)


def test_rate_rises_and_falls_linearly(byte_llama: "LlamaForCausalLM") -> None:
    config = smollm2_lora(steps=6, warmup_steps=2, learning_rate=1.0)
    settings = CausalLM(byte_llama, config).configure_optimizers()
    optimizer, scheduler = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
