"""Small causal language models of transformers, and their head and loss as one; for the tests of that."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kpt_lightning.candidates.linear_cross_entropy import CANDIDATE
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.hardware import detect
from kpt_lightning.validation.numerics import relative_error

BF16 = torch.bfloat16


VOCABULARY, LENGTH = 67, 12


SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1)
    ),
}


SETTINGS = {"head": "lm_head", "chunk_rows": 7}


def build(name: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    # Dropout of GPT-2 would draw other numbers in each run.
    return MODELS[name]().eval()


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :3], labels[1, -4:] = -100, -100
    return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


@contextmanager
def changed(model: nn.Module, setting: Mapping[str, Any] = SETTINGS) -> Iterator[None]:
    sub = Subject(model=model, profile=detect(), config=KptConfig(), device=torch.device("cpu"))
    applied = CANDIDATE.apply(sub, setting)
    try:
        yield
    finally:
        CANDIDATE.undo(sub, applied)


def results(model: nn.Module, autocast: torch.dtype | None = None, **more: Any) -> dict[str, Tensor]:
    """Loss and every gradient."""
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = model(**batch(), **more).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor], allowed: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    # Some gradients are zero but for rounding, such as that of GPT-2's key bias.
    errors = {name: relative_error(each, other[name]) for name, each in one.items() if each.norm() > 1e-7}
    assert max(errors.values()) < allowed, errors


def square(logits: Tensor) -> Tensor:
    return logits.square().mean()
