"""A transformers model as users have it, with its key-value cache on: one graph must serve all layers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kpt_lightning.config import KptConfig
from kpt_lightning.optimize.engine import Engine

ON = {"precision": "32", "compile": {"blocks": True}}


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2, vocab_size=32
    )  # fmt: skip
    return LlamaForCausalLM(config)


def step(engine: Engine, model: Any, length: int = 8) -> float:
    tokens = torch.randint(0, 32, (2, length), generator=torch.Generator().manual_seed(0))

    def run() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.item()

    return float(engine.step(run, whole=True))


def test_more_layers_than_the_recompile_limit_run_as_one_graph() -> None:
    torch._dynamo.reset()
    model, engine = llama(12), Engine(KptConfig.build(ON))
    assert model.config.use_cache
    assert torch._dynamo.config.recompile_limit < 12
    engine.start(model, "cpu")
    step(engine, model)
    assert engine.plan is not None
    (proof,) = engine.plan.explain("whole graphs")
    assert proof
    assert proof.reason.startswith("1 graphs for 12 modules")
    assert engine.plan.accepts("use_cache off")
    engine.stop()
    assert model.config.use_cache


def test_a_cache_that_the_user_switched_off_stays_off() -> None:
    model, engine = llama(2), Engine(KptConfig.build(ON))
    model.config.use_cache = False
    engine.start(model, "cpu")
    assert engine.plan is not None
    assert not engine.plan.accepts("use_cache off")
    engine.stop()
    assert model.config.use_cache is False


def test_the_recompile_limit_has_room_for_each_block_and_is_restored() -> None:
    before = torch._dynamo.config.recompile_limit
    engine = Engine(KptConfig.build(ON))
    engine.start(llama(3), "cpu")
    assert torch._dynamo.config.recompile_limit == 3 * before
    engine.stop()
    assert torch._dynamo.config.recompile_limit == before


def test_blocks_that_fall_back_to_python_after_step_one_are_reported() -> None:
    torch._dynamo.reset()
    model, engine = llama(2), Engine(KptConfig.build(ON))
    engine.start(model, "cpu")
    step(engine, model)
    with torch._dynamo.config.patch(recompile_limit=1):
        step(engine, model, 12)  # another length needs a graph for any length
    with pytest.warns(UserWarning, match="after step 1: .* functions run uncompiled beside 2 modules"):
        engine.stop()
