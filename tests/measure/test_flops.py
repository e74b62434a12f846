"""The formula against torch's own counter on real models, run eagerly so that every matmul is seen."""

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kpt_lightning.config import Float8Config
from kpt_lightning.decision import Rejected
from kpt_lightning.measure.flops import training_flops
from kpt_lightning.precision.convert import convert_to_float8

BATCH, LENGTH = 2, 12


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, attn_implementation="eager", tie_word_embeddings=False,
        )
    )  # fmt: skip


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager"
        )
    )


def counted(model, *inputs, loss):
    """Forward and backward FLOPs by FlopCounterMode."""
    with FlopCounterMode(display=False) as forward:
        value = loss(model(*inputs))
    with FlopCounterMode(display=False) as backward:
        value.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def of_language_model(model):
    ids = torch.randint(0, 64, (BATCH, LENGTH))
    return counted(model, ids, loss=lambda output: output.logits.float().square().mean())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_trained_language_model_is_counted_exactly(build):
    model = build()
    forward, backward = of_language_model(model)
    count = training_flops(model, BATCH * LENGTH, LENGTH, causal=False)
    # transformers' rotary embedding is a matmul of positions with frequencies, and no model work
    rotary = 2 * LENGTH * (32 // 4 // 2) if build is llama else 0
    assert forward - count.forward in (0, rotary, rotary * BATCH)
    assert count.backward == backward


def test_causal_attention_counts_half_and_is_recognized_by_the_class():
    model = llama()
    full = training_flops(model, BATCH * LENGTH, LENGTH, causal=False)
    none = training_flops(model, BATCH * LENGTH, 0)
    causal = training_flops(model, BATCH * LENGTH, LENGTH)
    assert causal.flops - none.flops == (full.flops - none.flops) / 2
    assert "causal" in causal.formula


def test_attention_is_4_s_d_per_token_and_layer():
    model = llama()
    with_attention = training_flops(model, 100, 10, causal=False).forward
    assert with_attention - training_flops(model, 100, 0).forward == 4 * 10 * 32 * 3 * 100


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_leaves_out_weight_gradients_of_the_frozen_base():
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    forward, backward = of_language_model(model)
    count = training_flops(model, BATCH * LENGTH, LENGTH, causal=False)
    # Nothing trained produced the input of layer 0, so autograd skips its input gradients and that of the keys. The
    # formula knows this only of what is registered before the first adapter: q_proj's base and lora_A.
    tokens = BATCH * LENGTH
    k_and_v = 2 * tokens * 32 * 16 * 2
    lora_a = 2 * tokens * 32 * 2
    assert count.forward == pytest.approx(forward, rel=0.001)
    keys = 2 * LENGTH * 32 * tokens
    assert count.backward - backward == k_and_v + lora_a + keys


def test_a_frozen_base_costs_4nk_per_token_with_trained_embeddings():
    model = llama()
    trained = training_flops(model, 1, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" in name)
    assert training_flops(model, 1, 0).flops == pytest.approx(trained.flops * 4 / 6)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_an_mlp_is_counted_exactly_whatever_is_frozen(frozen):
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)]
    model = nn.Sequential(*layers)
    for layer in layers[:frozen]:
        layer.requires_grad_(False)
    forward, backward = counted(model, torch.randn(5, 8), loss=lambda out: out.square().mean())
    count = training_flops(model, 5)
    assert (count.forward, count.backward) == (forward, backward)
    assert any("attention" in left for left in count.left_out)


def test_fp8_conversion_does_not_change_the_count():
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16))
    before = training_flops(model, 5)
    assert convert_to_float8(model, ["0", "1"], Float8Config(emulate=True, only_where_it_pays=False))
    assert training_flops(model, 5) == before


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), "Conv2d"),
        (nn.LSTM(4, 4), "LSTM"),
        (nn.TransformerEncoderLayer(8, 2), "MultiheadAttention"),
        (nn.LayerNorm(4), "no linear layer"),
    ],
    ids=["conv", "lstm", "attention", "norm"],
)
def test_a_model_without_a_formula_is_rejected_with_the_reason(model, reason):
    answer = training_flops(model, 10, 10)
    assert isinstance(answer, Rejected)
    assert reason in answer.reason


def test_attention_without_a_sequence_length_is_rejected():
    assert "sequence length" in training_flops(llama(), 10).reason


def test_mixture_of_experts_is_rejected():
    model = llama()
    model.config.num_local_experts = 4
    assert "mixture of experts" in training_flops(model, 10, 10).reason
