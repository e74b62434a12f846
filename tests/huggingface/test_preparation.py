import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from kpt_lightning.errors import ConfigError
from kpt_lightning.huggingface import KptAccelerator, prepare
from tests.huggingface.conftest import FP8
from tests.huggingface.tiny import llama, rows, train


def test_prepare_converts_and_returns_what_accelerate_returns() -> None:
    accelerator, model = Accelerator(), llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    unpatched = Accelerator.prepare
    prepared, optimizer, loader = prepare(accelerator, model, optimizer, DataLoader(rows(), batch_size=4), config=FP8)
    assert Accelerator.prepare is unpatched
    assert prepared is model
    losses = train(accelerator, prepared, optimizer, loader)
    assert losses[-1] < losses[0]
    (plan,) = accelerator.kpt.plans
    assert all(proof for proof in plan.proofs if proof.subject == "fp8 calls")


def test_a_second_config_is_refused() -> None:
    accelerator = Accelerator()
    prepare(accelerator, llama(), config=FP8)
    prepare(accelerator, llama())
    prepare(accelerator, llama(), config=FP8)
    with pytest.raises(ConfigError, match="differs from that of the first call"):
        prepare(accelerator, llama(), config={"precision": "bf16-mixed"})


def test_the_accelerator_of_ours_does_the_same() -> None:
    accelerator, model = KptAccelerator(kpt=FP8, gradient_accumulation_steps=2), llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=4))
    assert len(train(accelerator, model, optimizer, loader)) == 8
    (plan,) = accelerator.kpt.plans
    assert {proof.subject for proof in plan.proofs if proof} >= {"fp8 calls", "fp8 gradients"}
    assert isinstance(accelerator, Accelerator)


def test_a_wrong_setting_is_refused_before_accelerate_starts() -> None:
    with pytest.raises(ConfigError, match="level"):
        KptAccelerator(kpt={"level": "much"})


def test_saved_weights_have_the_plain_names(tmp_path: object) -> None:
    accelerator, model = KptAccelerator(kpt=FP8), llama()
    model = accelerator.prepare(model)
    accelerator.unwrap_model(model).save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in llama().named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
