"""What the engine proves of the first steps, and what it replays."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError, UnsupportedHardwareError, VerificationError
from kpt_lightning.optimize.engine import Engine
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optional import TORCHAO
from kpt_lightning.precision.float8_linear import Float8Linear
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
