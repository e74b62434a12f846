"""The engine on real models: applied, proved, undone, also where something fails on the way."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError, KptError, UnsupportedHardwareError, VerificationError
from kpt_lightning.optimize.engine import Engine
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optional import TORCHAO
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.validation.numerics import sqnr_db

# torch 2.13 warns of what its own compiler does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*torch.jit.* is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
EMULATED = {"emulate": True, "only_where_it_pays": False}


@pytest.fixture(autouse=True)
def written_by_the_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's compiler sets this variable and leaves it."""
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")
    yield
    torch.compiler.reset()


def engine(**settings: Any) -> Engine:
    return Engine(KptConfig.build({"precision": "fp8", "float8": EMULATED} | settings))


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **sizes))


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def state(model: nn.Module) -> list[Any]:
    """Everything that the engine may touch."""
    return [
        [
            (name, type(module), sorted(vars(module)), module._compiled_call_impl)
            for name, module in model.named_modules()
        ],
        [(name, id(each), each.dtype, each.requires_grad) for name, each in model.named_parameters()],
    ]


def training_step(started: Engine, model: Any, data: Any = None) -> Tensor:
    with started.autocast():
        loss: Tensor = model(**(data or batch())).loss
    loss.backward()
    return loss.detach()


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


class Blocks(nn.Module):
    """Two small blocks: quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


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


def test_the_first_step_is_proved_by_calls_and_the_second_says_why_not_by_kernels() -> None:
    model, started = llama(), engine()
    plan = started.start(model, "cpu")
    for _ in range(3):
        started.step(lambda: training_step(started, model), whole=True)
    (calls,), (kernels,) = plan.explain("fp8 calls"), plan.explain("fp8 kernels")
    assert (bool(calls), bool(kernels)) == (True, False)
    assert "42 emulated FP8 GEMMs by the end of step 1 (output 14, grad_input 14, grad_weight 14)" in calls.reason
    assert kernels.reason == "no CUDA device to profile; calls were counted"
    started.stop()


def test_a_profiler_of_the_users_is_not_disturbed() -> None:
    model, started = llama(), engine()
    plan = started.start(model, "cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            started.step(lambda: training_step(started, model), whole=True)
    assert plan.explain("fp8 kernels")[0] == Rejected("fp8 kernels", "another profiler is running; calls were counted")
    assert any("float8_gemm" in event.key for event in profiler.key_averages())
    started.stop()


def test_fp8_layers_that_never_run_stop_training_with_an_error() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.layer.weight)

    model, started = Past(), engine()
    started.start(model, "cpu")
    with pytest.raises(VerificationError, match="not one FP8 GEMM ran"):
        started.step(lambda: model(torch.randn(16, 32)).sum().backward() or 1.0, whole=True)
    started.stop()


def test_layers_that_do_not_run_in_step_one_warn_with_their_size() -> None:
    model = nn.ModuleDict({"used": nn.Linear(32, 32), "unused": nn.Linear(64, 32)})
    started = engine()
    started.start(model, "cpu")
    x = torch.randn(16, 32, requires_grad=True)
    with pytest.warns(UserWarning, match="0 output GEMMs for 1 FP8 layers of size 64 -> 32"):
        started.step(lambda: model["used"](x).sum().backward() or 1.0, whole=True)
    started.stop()


def test_a_step_that_the_user_skipped_is_not_taken_for_a_fault() -> None:
    model, started = llama(), engine()
    plan = started.start(model, "cpu")
    assert started.step(lambda: None, whole=True) is None
    assert plan.proofs == []
    started.step(lambda: training_step(started, model), whole=True)
    assert [bool(proof) for proof in plan.explain("fp8 calls")] == [True]
    started.stop()


def test_bf16_casts_the_weights_for_good_and_keeps_the_parameters() -> None:
    model, started = llama(), engine(precision="bf16", float8={})
    parameters = list(model.parameters())
    started.start(model, "cpu")
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    started.stop()
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copy_of_a_running_engine_has_its_plan_and_holds_no_model(copied: Callable[[Engine], Engine]) -> None:
    model, started = llama(), engine()
    plan = started.start(model, "cpu")
    other = copied(started)
    other.stop()
    assert other.plan == plan
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 14
    assert len(other.start(llama(), "cpu").float8_layers) == 14
    other.stop()
    started.stop()


def test_fp8_without_a_unit_for_it_is_refused_before_and_with_a_model() -> None:
    started = engine(float8={"only_where_it_pays": False})
    model = llama()
    before = state(model)
    for attempt in (lambda: started.check("cpu"), lambda: started.start(model, "cpu")):
        with pytest.raises(UnsupportedHardwareError, match=r"float8\.emulate=True"):
            attempt()
    assert state(model) == before


@pytest.mark.sm89
def test_on_a_gpu_as_many_fp8_kernels_run_as_calls_were_counted() -> None:
    model = nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024)).cuda()
    started = engine(float8={"only_where_it_pays": False})
    plan = started.start(model, "cuda")
    x = torch.randn(256, 1024, device="cuda", requires_grad=True)

    def step() -> float:
        with started.autocast():
            model(x).sum().backward()
        return 1.0

    for _ in range(2):
        started.step(step, whole=True)
    assert all(plan.proofs)
    assert plan.explain("fp8 kernels")[0].reason.startswith("6 FP8 GEMM kernels")
    started.stop()


@pytest.mark.sm89
def test_on_a_gpu_a_profiler_of_the_users_makes_the_kernel_proof_a_rejection() -> None:
    model = nn.Sequential(nn.Linear(1024, 4096)).cuda()
    started = engine(float8={"only_where_it_pays": False})
    plan = started.start(model, "cuda")
    x = torch.randn(256, 1024, device="cuda", requires_grad=True)
    with torch.profiler.profile():
        for _ in range(2):
            started.step(lambda: model(x).sum().backward() or 1.0, whole=True)
    assert plan.explain("fp8 kernels")[0] == Rejected("fp8 kernels", "another profiler is running; calls were counted")
    started.stop()


@pytest.mark.parametrize(("used", "proved"), [("math", True), ("flash", False)])
def test_the_attention_kernel_that_ran_is_held_against_the_plan(used: str, proved: bool) -> None:
    config = KptConfig.build({"precision": "32"})
    change = Change(candidate="attention_backend", setting={"backend": "math"})
    plan = Plan(config=config, device="cpu", precision="32", parallel="single", changes=[change])
    started, model = Engine(config), llama()
    started.start(model, "cpu", plan=plan)
    backends = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}

    def step() -> Tensor:
        with started.autocast(), sdpa_kernel(backends[used]):
            loss: Tensor = model(**batch()).loss
        loss.backward()
        return loss

    for _ in range(2):
        started.step(step, whole=True)
    if proved:
        started.step(step, whole=True)
    else:
        with pytest.warns(UserWarning, match="math.*was planned"):
            started.step(step, whole=True)
    assert started.plan is not None
    (proof,) = [each for each in started.plan.proofs if each.subject == "attention"]
    assert bool(proof) is proved
    started.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torchao")
@pytest.mark.skipif(not TORCHAO.available(), reason="torchao is not installed")
@pytest.mark.parametrize("precision", ["bf16-mixed", "fp8", "32"])
def test_bf16_weights_are_replayed_where_the_plan_runs_in_bf16(precision: str) -> None:
    config = KptConfig.build({"precision": "bf16-mixed"})
    changes = [Change(candidate="bf16_weights")]
    plan = Plan(config=config, device="cpu", precision=precision, parallel="single", changes=changes)
    started, model = Engine(config), Blocks()
    optimizer = torch.optim.AdamW(model.parameters())
    if precision == "32":
        with pytest.raises(ConfigError, match="need bf16 autocast first"):
            started.start(model, "cpu", plan=plan, optimizer=optimizer)
    else:
        started.start(model, "cpu", plan=plan, optimizer=optimizer)
        assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
        started.stop()
    assert {each.dtype for each in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32", "float32"), ("fp8", "bfloat16"), ("16-mixed", "float16"), ("64-true", "float32")]
)
def test_a_replayed_change_sees_the_dtype_that_the_plan_runs_in(precision: str, dtype: str) -> None:
    config = KptConfig()
    plan = Plan(config=config, device="cpu", precision=precision, parallel="single")
    started = Engine(config)
    started.start(Blocks(), "cpu", plan=plan)
    assert started.subject is not None
    assert started.subject.compute_dtype is getattr(torch, dtype)
    started.stop()
