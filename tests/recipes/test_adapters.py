from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from kpt_lightning import optional
from kpt_lightning.errors import ConfigError, MissingDependencyError
from kpt_lightning.recipes import adapters
from kpt_lightning.recipes.adapters import add_lora, quantize_base
from kpt_lightning.recipes.config import LoraSettings
from kpt_lightning.recipes.frozen_linear import Base, FrozenLinear

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_adapters_are_two_matrices_a_layer_and_nothing_else_is_trained(byte_llama: "LlamaForCausalLM") -> None:
    shapes = [module.weight.shape for name, module in byte_llama.named_modules() if name.endswith(LAYERS)]
    adapted = add_lora(byte_llama, LoraSettings(rank=2))
    trainable = {name: each.numel() for name, each in adapted.named_parameters() if each.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert sum(trainable.values()) == sum(2 * sum(shape) for shape in shapes)


def test_new_adapters_change_no_output(byte_llama: "LlamaForCausalLM") -> None:
    tokens = torch.arange(32).reshape(2, 16)
    before = byte_llama.eval()(input_ids=tokens).logits.detach()
    torch.testing.assert_close(add_lora(byte_llama, LoraSettings()).eval()(input_ids=tokens).logits, before)


def test_a_name_that_no_layer_has_is_refused(byte_llama: "LlamaForCausalLM") -> None:
    with pytest.raises(ConfigError, match=r"lora.target_modules=\('query',\): .*or write 'all-linear'"):
        add_lora(byte_llama, LoraSettings(target_modules=("query",)))


def test_missing_peft_names_the_pip_line(byte_llama: "LlamaForCausalLM", monkeypatch: pytest.MonkeyPatch) -> None:
    absent = optional.OptionalPackage("no_such_module_here", "peft", "finetune", "LoRA")
    monkeypatch.setattr(adapters, "PEFT", absent)
    with pytest.raises(MissingDependencyError, match=r"LoRA needs peft, not installed. Run: pip install"):
        add_lora(byte_llama, LoraSettings())


@pytest.mark.parametrize("base", ["fp8", "int4"])
def test_adapters_on_a_quantized_base_learn_as_on_the_dequantized_one(
    byte_llama: "LlamaForCausalLM", base: Base
) -> None:
    import copy

    tokens = torch.arange(32).reshape(2, 16)
    ours = add_lora(byte_llama, LoraSettings(rank=2))
    for name, each in ours.named_parameters():
        if "lora_B" in name:
            # Zero at first, which would keep gradients from the matrices below.
            nn.init.constant_(each, 0.01)
    theirs = copy.deepcopy(ours)
    assert quantize_base(ours, base) == len(LAYERS) * 2
    dense = {name: module for name, module in theirs.named_modules() if name.endswith("base_layer")}
    for name, module in ours.named_modules():
        if isinstance(module, FrozenLinear):
            dense[name].weight.data = module.weight
    for model in (ours, theirs):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [{name: each.grad for name, each in m.named_parameters() if "lora_" in name} for m in (ours, theirs)]
    assert all(bool(each.any()) for each in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])
