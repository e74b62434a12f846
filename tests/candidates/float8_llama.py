"""A small Llama in emulated FP8, and what a pass of it gives: for candidates that go on from FP8 layers."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kpt_lightning.candidates.float8 import CANDIDATE as FLOAT8
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.hardware import detect
from kpt_lightning.validation.calls import record_calls

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "use_cache": False,
}  # fmt: skip


def llama(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | more)))
    # At its start a transformers model's layers do next to nothing beside the residual stream.
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(3.0 if each.dim() > 1 else 1.0)
    return model


def passes(model: nn.Module) -> Callable[[], Tensor]:
    device = next(model.parameters()).device
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)

    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    return run


def in_float8(
    model: nn.Module, run: Callable[[], Tensor], *, recipe: str = "tensorwise", small: bool = True
) -> Subject:
    """The layers that ``small`` leaves out are those below 64 rows of weight: the keys and values."""
    device = next(model.parameters()).device
    section = {"emulate": device.type == "cpu", "only_where_it_pays": False, "recipe": recipe}
    config = KptConfig.build({"precision": "fp8", "float8": section})
    subject = Subject(
        model=model, profile=detect(), config=config, device=device, compute_dtype=torch.bfloat16,
        calls=record_calls(model, run),
    )  # fmt: skip
    names = [
        name
        for name, each in model.named_modules()
        if type(each) is nn.Linear and "lm_head" not in name and (small or each.out_features >= 64)
    ]
    FLOAT8.apply(subject, {"recipe": recipe, "layers": names})
    subject.calls = record_calls(model, run)
    return subject


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = run()
    loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}
