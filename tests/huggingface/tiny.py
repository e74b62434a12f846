"""A tiny Llama and the ordinary loop around it, as a user writes it."""

from typing import Any

import torch
from torch import nn

SEEN_ROWS, LENGTH, WORDS = 32, 16, 128


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def rows(count: int = SEEN_ROWS) -> torch.Tensor:
    """Counting from a random number on, which a model learns quickly."""
    begin = torch.randint(0, 8, (count, 1), generator=torch.Generator().manual_seed(1))
    return begin + torch.arange(LENGTH)


def examples(count: int = SEEN_ROWS) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in rows(count)]


def train(accelerator: Any, model: nn.Module, optimizer: Any, loader: Any, *, clip: float | None = 1.0) -> list[float]:
    """The losses of one epoch."""
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses
