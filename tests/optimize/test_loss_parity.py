"""Training a small Llama on real text: FP8 ends where bf16 and fp32 end, within what another seed changes."""

import functools
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from kpt_lightning.config import KptConfig
from kpt_lightning.optimize.engine import Engine

STEPS, LAST = 60, 15
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


@functools.cache
def text() -> Tensor:
    """The bytes of a few modules of the standard library."""
    names = ("argparse", "ast", "datetime", "decimal", "inspect", "tarfile", "typing")
    folder = Path(sysconfig.get_path("stdlib"))
    data = b"".join((folder / f"{name}.py").read_bytes() for name in names)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


@functools.cache
def final_loss(precision: str, recipe: str, seed: int) -> float:
    """Mean loss of the last steps of a training run whose weights and batches follow from ``seed``."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **sizes))
    float8 = {"recipe": recipe, "emulate": True, "only_where_it_pays": False} if precision == "fp8" else None
    engine = Engine(KptConfig.build({"precision": precision}, float8=float8))
    engine.start(model, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    starts = torch.randint(0, len(text()) - 64, (STEPS, 8), generator=torch.Generator().manual_seed(seed))
    losses = []
    for batch in starts:
        ids = torch.stack([text()[start : start + 64] for start in batch])
        with engine.autocast():
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    engine.stop()
    assert losses[0] > 5.3  # ln 256 = 5.5: nothing is known at first
    return sum(losses[-LAST:]) / LAST


def test_bf16_and_fp32_learn_the_same() -> None:
    assert final_loss("32", "", 0) < 3.3
    assert final_loss("bf16-mixed", "", 0) == pytest.approx(final_loss("32", "", 0), rel=0.01)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_ends_at_the_loss_of_bf16_within_what_another_seed_changes(recipe: str) -> None:
    seeds = [final_loss("bf16-mixed", "", seed) for seed in range(3)]
    gap = final_loss("fp8", recipe, 0) - seeds[0]
    assert abs(gap) < max(seeds) - min(seeds)
    assert abs(gap) < 0.01 * seeds[0]
