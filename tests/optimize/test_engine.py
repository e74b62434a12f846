"""The engine on real models: applied, proved, undone, also where something fails on the way."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.decision import Rejected
from kpt_lightning.errors import KptError, UnsupportedHardwareError
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.validation.numerics import sqnr_db
from tests.optimize.started import Blocks, batch, engine, llama, state, training_step

# torch 2.13 warns of what its own compiler does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*torch.jit.* is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


@pytest.fixture(autouse=True)
def written_by_the_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's compiler sets this variable and leaves it."""
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")
    yield
    torch.compiler.reset()


ALL_ON = {"compile": {"blocks": True, "loss": True}}


def test_start_applies_the_plan_and_stop_leaves_the_model_as_it_was() -> None:
    model = llama()
    before = state(model)
    started = engine(**ALL_ON)
    plan = started.start(model, "cpu")
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == len(plan.float8_layers) == 14
    assert all(block._compiled_call_impl is not None for block in model.model.layers)
    assert "_loss_function" in vars(model)
    started.stop()
    assert state(model) == before
    assert started.plan is plan
    started.stop()  # again: nothing to do


def test_compiled_blocks_are_really_compiled_and_give_the_numbers_of_uncompiled_ones() -> None:
    results = []
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    for compiled in (False, True):
        model, started = Blocks(), engine(compile={"blocks": compiled})
        assert len(started.start(model, "cpu").compiled_blocks) == 2 * compiled
        torch._dynamo.utils.counters.clear()
        with started.autocast(), count_gemms() as counts:
            out = model(x.clone().requires_grad_())
        out.float().square().mean().backward()
        results.append([out, *(each.grad for each in model.parameters())])
        counters = torch._dynamo.utils.counters
        assert bool(counters["stats"]["unique_graphs"]) is compiled
        assert bool(counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]) is compiled
        assert counts.of_role("output") == 2
        started.stop()
    for plain, fused in zip(*results, strict=True):
        assert sqnr_db(plain, fused) > 20  # fused kernels skip roundings to bf16, which moves some FP8 values a step


def test_a_compiled_loss_gives_the_loss_of_the_uncompiled_one() -> None:
    model, started = llama(), engine(precision="32", float8={}, compile={"loss": True})
    want = training_step(started, model)
    started.start(model, "cpu")
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(training_step(started, model), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    started.stop()


def test_a_model_that_raises_in_the_middle_is_left_as_it_was_after_stop() -> None:
    model, started = llama(), engine()
    before = state(model)
    started.start(model, "cpu")
    with pytest.raises(ValueError, match="Expected input batch_size"):
        started.step(lambda: training_step(started, model, {**batch(), "labels": torch.zeros(1, 3).long()}), whole=True)
    started.stop()
    assert state(model) == before


class Stubborn(nn.Module):
    """A model whose loss function, as transformers has it, cannot be replaced when it is tried."""

    loss_type = "ForCausalLM"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2))

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        return nn.functional.mse_loss

    @loss_function.setter
    def loss_function(self, value: object) -> None:
        raise TypeError("this model keeps its loss")


def test_a_start_that_fails_half_way_leaves_model_and_engine_as_they_were() -> None:
    model, started = Stubborn(), engine(**ALL_ON)
    before = state(model)
    with pytest.raises(TypeError, match="keeps its loss"):
        started.start(model, "cpu")
    assert state(model) == before
    assert started.plan is None
    with count_gemms() as counts:
        model.layers[0](torch.randn(16, 32))
    assert counts.total == 0
    other = llama()
    assert len(started.start(other, "cpu").float8_layers) == 14
    started.stop()


def test_a_failed_start_casts_no_weight() -> None:
    model, started = Stubborn(), engine(precision="bf16", float8={}, **ALL_ON)
    with pytest.raises(TypeError, match="keeps its loss"):
        started.start(model, "cpu")
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_starting_the_same_model_twice_is_starting_it_once() -> None:
    model, started = llama(), engine(**ALL_ON)
    before = state(model)
    first, again = started.start(model, "cpu"), started.start(model, "cpu")
    assert first == again
    assert first is not again
    started.stop()
    assert state(model) == before


def test_a_second_model_is_refused_while_the_first_is_in_use_and_the_first_goes_on() -> None:
    first, second, started = llama(), llama(), engine()
    started.start(first, "cpu")
    with pytest.raises(KptError, match="one engine serves one model"):
        started.start(second, "cpu")
    with count_gemms() as counts:
        training_step(started, first)
    assert counts.of_role("output") == 14
    started.stop()
    started.start(second, "cpu")
    started.stop()


def test_a_block_that_the_user_compiled_is_left_alone() -> None:
    model, started = llama(), engine(**ALL_ON)
    model.model.layers[1].compile(backend="eager")
    compiled = model.model.layers[1]._compiled_call_impl
    plan = started.start(model, "cpu")
    assert plan.compiled_blocks == ["model.layers.0"]
    assert plan.explain("model.layers.1") == [
        Rejected("model.layers.1", "LlamaDecoderLayer: compiled by the user already")
    ]
    assert model.model.layers[1]._compiled_call_impl is compiled
    started.stop()
    assert model.model.layers[1]._compiled_call_impl is compiled
    assert model.model.layers[0]._compiled_call_impl is None


@pytest.mark.parametrize("in_place", [True, False], ids=["model.compile()", "torch.compile(model)"])
def test_blocks_of_a_model_that_the_user_compiled_whole_are_not_compiled_again(in_place: bool) -> None:
    model, started = llama(), engine(compile={"blocks": True})
    given = model
    if in_place:
        model.compile(backend="aot_eager")
    else:
        given = torch.compile(model, backend="aot_eager")
    plan = started.start(given, "cpu")
    assert plan.blocks == []
    assert len(plan.float8_layers) == 14
    assert [block._compiled_call_impl for block in model.model.layers] == [None, None]
    with count_gemms() as counts:
        loss = training_step(started, given)
    assert loss.isfinite()
    assert counts.of_role("output") == 14
    started.stop()
    assert not any(isinstance(module, Float8Linear) for module in model.modules())
    assert (model._compiled_call_impl is not None) is in_place


class Keras(nn.Module):
    """A block with a method ``compile`` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 32))

    def compile(self, optimizer: str) -> None:
        raise AssertionError("this is not torch's compile")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_a_block_with_a_method_named_compile_is_compiled_by_torch() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([Keras(), Keras()])})
    started = engine(compile={"blocks": True})
    assert started.start(model, "cpu").compiled_blocks == ["blocks.0", "blocks.1"]
    started.stop()


def test_a_loss_function_that_the_user_replaced_is_left_alone() -> None:
    def mine(*_: Any, **__: Any) -> Tensor:
        return torch.zeros(())

    model, started = llama(), engine(**ALL_ON)
    model.loss_function = mine
    with pytest.raises(UnsupportedHardwareError, match=r"compile.loss=True was asked for, and .* was replaced already"):
        started.start(model, "cpu")
    assert model.loss_function is mine
