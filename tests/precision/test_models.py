"""Whole models: every linear layer is decided on, and a training step keeps the gradients of fp32."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kpt_lightning.config import Float8Config
from kpt_lightning.precision.convert import convert_to_float8, decide_layers, restore_linear
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.validation.numerics import sqnr_db

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
Loss = Callable[[Any], Tensor]


def config(recipe: str = "tensorwise") -> Float8Config:
    return Float8Config.model_validate({"recipe": recipe, "emulate": True, "only_where_it_pays": False})


def _llama() -> tuple[nn.Module, Loss]:
    ids = torch.randint(0, 96, (2, 24))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **SMALL))
    return model, lambda it: it(input_ids=ids, labels=ids).loss


def _bert() -> tuple[nn.Module, Loss]:
    ids = torch.randint(0, 96, (2, 24))
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=96, **SMALL))
    return model, lambda it: it(input_ids=ids, labels=ids).loss


def _vit() -> tuple[nn.Module, Loss]:
    pixels, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 16, (4,))
    settings = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=16, **SMALL)
    return transformers.ViTForImageClassification(settings), lambda it: it(pixel_values=pixels, labels=labels).loss


def _torch_encoder() -> tuple[nn.Module, Loss]:
    x = torch.randn(2, 24, 64)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2), lambda it: it(x).square().mean()


MODELS = {"llama": _llama, "bert": _bert, "vit": _vit, "torch encoder": _torch_encoder}
# Linear layers that stay: name ending -> reason. Everything else converts.
LEFT = {
    "llama": {"lm_head": "exclude names it"},
    "bert": {"decoder": "tied to 'bert.embeddings.word_embeddings'"},
    "vit": {"classifier": "exclude names it"},
    "torch encoder": {"out_proj": "NonDynamicallyQuantizableLinear"},
}


def gradients(model: nn.Module, loss: Loss) -> dict[str, Tensor]:
    model.eval()  # no dropout; the gradient is the same function
    model.zero_grad()
    loss(model).backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_of_a_whole_model_keeps_the_gradients_within_15_db_of_fp32(name: str, recipe: str) -> None:
    torch.manual_seed(0)
    model, loss = MODELS[name]()
    exact = gradients(model, loss)
    decisions = decide_layers(model, config(recipe))
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [layer.subject for layer in decisions] == linear
    for layer in decisions:
        ending = layer.subject.rpartition(".")[2]
        assert bool(layer) == (ending not in LEFT[name]), layer
        assert layer or LEFT[name][ending] in layer.reason
    layers = convert_to_float8(model, [layer.subject for layer in decisions if layer], config(recipe))
    with count_gemms() as counts:
        got = gradients(model, loss)
    assert counts.of_role("output") == len(layers)
    assert got.keys() == exact.keys()
    assert sqnr_db(*(torch.cat([grads[key].flatten() for key in exact]) for grads in (exact, got))) > 15
    restore_linear(layers)
    for key, again in gradients(model, loss).items():
        assert torch.equal(again, exact[key]), key


def test_gpt2_has_no_layer_to_convert_and_the_reasons_say_why() -> None:
    settings = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=96)
    decisions = decide_layers(transformers.GPT2LMHeadModel(settings), config())
    assert not any(decisions)
    assert [layer.subject.rpartition(".")[2] for layer in decisions] == [
        "c_attn",
        "c_proj",
        "c_fc",
        "c_proj",
        "lm_head",
    ]
    assert all("Conv1D" in layer.reason for layer in decisions[:-1])


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
def test_the_fast_path_of_torch_in_eval_mode_reads_the_master_weights_and_stays_right() -> None:
    torch.manual_seed(0)
    model, _ = _torch_encoder()
    x = torch.randn(2, 24, 64)
    model.eval()
    with torch.no_grad():
        want = model(x)
        layers = convert_to_float8(model, [each.subject for each in decide_layers(model, config()) if each], config())
        with count_gemms() as fast:
            got = model(x)
    with count_gemms() as slow:
        trained = model(x)
    assert (len(layers), fast.total, slow.total) == (4, 0, 4)
    torch.testing.assert_close(got, want)
    assert sqnr_db(want, trained) > 20


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_a_lora_model_runs_its_base_layers_in_fp8_learns_and_merges() -> None:
    import peft

    torch.manual_seed(0)
    model, loss = _llama()
    lora = peft.LoraConfig(r=16, target_modules=["q_proj", "up_proj"], init_lora_weights=True)
    model = peft.get_peft_model(model, lora)
    sized = Float8Config(emulate=True, include=("*_proj*",))
    small = {each.subject: each.reason for each in decide_layers(model, sized) if "lora_" in each.subject}
    assert len(small) == 8
    assert all("a side of 16 is too small" in reason for reason in small.values())
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and "base_layer" in name]
    convert_to_float8(model, names, config())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        step = loss(model)
        step.backward()
        optimizer.step()
        losses.append(step.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert len(changed) == 8
    assert all("lora_" in key for key in changed)
    model.eval()
    with torch.no_grad():
        adapted = loss(model)
        merged = model.merge_and_unload()
        assert sum(isinstance(module, Float8Linear) for module in merged.modules()) == 4
        assert loss(merged).item() == pytest.approx(adapted.item(), abs=0.05)


def test_a_converted_model_can_be_copied_by_hugging_face_means(tmp_path: Any) -> None:
    model, loss = _llama()
    convert_to_float8(model, [each.subject for each in decide_layers(model, config()) if each], config())
    want = loss(copy.deepcopy(model)).item()
    assert want == loss(model).item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers
        model.save_pretrained(tmp_path)
        plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, Float8Linear) for module in plain.modules())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
