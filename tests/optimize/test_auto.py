"""auto_optimize in a plain loop: the same objects, the same numbers, faster or unchanged, and undone on demand."""

import copy
import gc
import io
import json
import pickle
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import kpt_lightning
from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Change
from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError, KptError, VerificationError
from kpt_lightning.optimize import auto, search
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.replay import load_plan
from tests.optimize.faults import Made, Tiny, batch, faster, set_on

NAP = 0.03


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The candidates of this test: the search over all of them is another test's."""
    found: list[Any] = [Made("honest", faster)]
    monkeypatch.setattr(search, "ROUNDS", 6)
    monkeypatch.setattr(registry, "candidates", lambda: tuple(found))
    return found


def optimize(model: nn.Module, data: Any = None, **more: Any) -> nn.Module:
    settings = {"cache": False, "progress": False} | more
    return auto.auto_optimize(model, batch() if data is None else data, **settings)


def test_the_same_module_and_parameter_objects_come_back_and_restore_undoes_all(pool: list[Any]) -> None:
    model = Tiny(nap=NAP)
    before = [(name, id(each), each.clone()) for name, each in model.named_parameters()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    assert optimize(model) is model
    plan = kpt_lightning.plan_of(model)
    assert plan is not None
    assert [change.candidate for change in plan.changes] == ["honest"]
    assert model.nap == 0.0
    for (name, identity, value), (new_name, each) in zip(before, model.named_parameters(), strict=True):
        assert (name, identity) == (new_name, id(each))
        assert torch.equal(value, each)
    kpt_lightning.restore(model)
    assert (type(model), model.nap, kpt_lightning.plan_of(model)) == (Tiny, NAP, None)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_optimizing_again_starts_from_the_unchanged_model(pool: list[Any]) -> None:
    model = Tiny(nap=NAP)
    optimize(model)
    optimize(model)
    assert model.nap == 0.0
    kpt_lightning.restore(model)
    assert model.nap == NAP


def test_training_after_it_gives_the_losses_of_the_unchanged_model(pool: list[Any]) -> None:
    losses = []
    for optimized in (False, True):
        torch.manual_seed(0)
        model = Tiny(nap=NAP)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        if optimized:
            optimize(model, optimizer=optimizer)
        run = []
        for _ in range(3):
            loss = model(batch())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(float(loss.detach()))
        losses.append(run)
    assert losses[0] == losses[1]


def test_a_second_run_takes_the_kept_plan_without_a_trial_and_says_so(
    pool: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimize(Tiny(nap=NAP), cache=tmp_path)
    capsys.readouterr()
    pool.append(None)  # a search would stumble over this
    pool.pop()
    model = Tiny(nap=NAP)
    optimize(model, cache=tmp_path, progress=True)
    said = capsys.readouterr().err
    assert "nothing is tried" in said
    assert "unchanged:" not in said
    assert kpt_lightning.plan_of(model).basis == "trial, kept from an earlier run"  # type: ignore[union-attr]
    assert model.nap == 0.0


@pytest.mark.parametrize("change", ["batch", "level", "width"])
def test_a_plan_for_another_batch_level_or_model_is_not_taken(pool: list[Any], tmp_path: Path, change: str) -> None:
    optimize(Tiny(nap=NAP), cache=tmp_path)
    data = batch(rows=6) if change == "batch" else batch()
    model = Tiny(nap=NAP)
    if change == "width":
        model.extra = nn.Linear(2, 2)
    optimize(model, data, cache=tmp_path, level="conservative" if change == "level" else None)
    assert kpt_lightning.plan_of(model).basis == "trial"  # type: ignore[union-attr]


def test_a_plan_is_replayed_from_json_and_one_that_does_not_fit_raises(pool: list[Any], tmp_path: Path) -> None:
    model = Tiny(nap=NAP)
    optimize(model)
    plan = kpt_lightning.plan_of(model)
    assert plan is not None
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_dict()))
    assert load_plan(file).to_dict() == plan.to_dict()
    other = Tiny(nap=NAP)
    optimize(other, plan=file)
    assert other.nap == 0.0
    pool.clear()
    with pytest.raises(ConfigError, match="honest"):
        optimize(Tiny(nap=NAP), plan=file)


def test_a_plan_explains_each_refusal_in_words_and_shows_all_of_it_in_a_table(pool: list[Any]) -> None:
    import rich.console

    pool.append(Made("crash", lambda model: 1 / 0))
    model = Tiny(nap=NAP)
    optimize(model)
    plan = kpt_lightning.plan_of(model)
    assert plan is not None
    (crash,) = plan.explain("crash")
    assert not crash
    assert "ZeroDivisionError" in crash.reason
    (layer,) = plan.explain("layers.0.up")
    assert "too small" in layer.reason
    console = rich.console.Console(width=100, record=True, file=io.StringIO())
    console.print(plan.render())
    text = console.export_text()
    for words in ("honest", "crash", "all kept changes", "made for a test"):
        assert words in text


def test_copies_and_pickles_of_an_optimized_model_are_models_of_their_own(pool: list[Any]) -> None:
    model = Tiny(nap=NAP)
    optimize(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is Tiny
        assert kpt_lightning.plan_of(other) is None
        assert torch.equal(other(batch()), model(batch()))
        with torch.no_grad():
            other.layers[0].up.weight.zero_()
        assert not torch.equal(other(batch()), model(batch()))


@pytest.mark.parametrize("changed", [True, False])
def test_a_model_that_nobody_uses_any_more_is_freed_with_its_plan(pool: list[Any], changed: bool) -> None:
    if not changed:
        pool.clear()
    model = Tiny(nap=NAP)
    optimize(model)
    plan = kpt_lightning.plan_of(model)
    assert plan is not None
    assert bool(plan.changes) is changed
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("bad", ["batch", "max_seconds", "level", "plan"])
def test_what_is_refused_leaves_the_plan_in_force(pool: list[Any], bad: str) -> None:
    model = Tiny(nap=NAP)
    optimize(model)
    plan = kpt_lightning.plan_of(model)
    assert plan is not None
    unknown = replace(plan, changes=[Change(candidate="unknown")])
    more = {"batch": {"data": iter([1])}, "max_seconds": {"max_seconds": 0}, "level": {"level": "reckless"},
            "plan": {"plan": unknown}}[bad]  # fmt: skip
    with pytest.raises(ConfigError, match="unknown" if bad == "plan" else bad):
        optimize(model, **more)
    assert kpt_lightning.plan_of(model) is plan
    assert model.nap == 0.0


class NoBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).long().float().mean()


@pytest.mark.parametrize(
    ("data", "more", "error", "says"),
    [
        (None, {"batch": None}, ConfigError, "batch"),
        ((each for each in [1]), {}, ConfigError, "batch"),
        (None, {"max_seconds": 0}, ConfigError, "max_seconds"),
        (None, {"max_seconds": "5"}, ConfigError, "max_seconds"),
        (None, {"goal": "fast"}, ConfigError, "goal: 'fast'|goal.*speed, memory"),
        (None, {"optimizer": torch.optim.SGD}, ConfigError, "optimizer.*SGD"),
        (
            None,
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])},
            ConfigError,
            "no parameter of this model",
        ),
        (None, {"level": "reckless"}, ConfigError, "level"),
        (torch.zeros(2, 3), {}, KptError, "forward and backward"),
    ],
)
def test_bad_input_is_told_and_the_model_is_as_before(data: Any, more: Any, error: Any, says: str) -> None:
    model = Tiny()
    before = sorted(vars(model))
    arguments = {"batch": batch() if data is None else data, "cache": False, "progress": False} | more
    with pytest.raises(error, match=says):
        auto.auto_optimize(model, **arguments)
    assert (type(model), sorted(vars(model))) == (Tiny, before)


def test_a_model_that_cannot_run_backward_is_told_so() -> None:
    with pytest.raises(KptError, match="gradient"):
        optimize(NoBackward(), torch.ones(3))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_no_backward_pass_or_no_code_can_be_tried_on_is_refused() -> None:
    with torch.no_grad(), pytest.raises(ConfigError, match="no_grad"):
        optimize(Tiny())
    with pytest.raises(ConfigError, match="ScriptModule"):
        optimize(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"no torch\.nn"):
        optimize(lambda x: x)


@pytest.mark.parametrize("where", ["meta", "none"])
def test_a_model_without_data_or_parameters_is_refused(where: str) -> None:
    model = nn.Linear(2, 2, device="meta") if where == "meta" else nn.ReLU()
    with pytest.raises(ConfigError, match="model"):
        optimize(model)


def test_what_the_first_step_ran_is_proved_at_the_second_and_a_mismatch_raises_by_setting() -> None:
    settings = {"precision": "fp8", "float8": {"emulate": True, "only_where_it_pays": False}}
    made = Plan(config=KptConfig.build(settings), device="cpu", precision="fp8", parallel="single")
    names = ["layers.0.up", "layers.1.up"]
    made.changes = [Change(candidate="float8", setting={"recipe": "tensorwise", "layers": names})]
    model = Tiny()
    optimize(model, plan=made)
    for _ in range(2):
        model(batch()).backward()
    plan = kpt_lightning.plan_of(model)
    assert plan is not None
    assert [proof.subject for proof in plan.proofs] == ["fp8 calls", "fp8 gradients", "fp8 kernels"]
    assert all(plan.proofs[:2])
    assert plan.proofs[2].reason == "no CUDA device to profile; calls were counted"
    kpt_lightning.restore(model)
    undo = set_on(model.layers[0].up, "forward", lambda x: nn.functional.linear(x, model.layers[0].up.weight))
    made.config = KptConfig.build(settings | {"on_mismatch": "raise"})
    undo()
    optimize(model, plan=made)
    set_on(model.layers[0].up, "forward", lambda x: nn.functional.linear(x, model.layers[0].up.weight))
    model(batch()).backward()
    with pytest.raises(VerificationError, match="on_mismatch"):
        model(batch())


@pytest.mark.parametrize("planned", ["math", "flash"])
def test_the_attention_kernel_of_a_plain_loop_is_held_against_the_plan(planned: str) -> None:
    change = Change(candidate="attention_backend", setting={"backend": planned})
    made = Plan(config=KptConfig(), device="cpu", precision="32", parallel="single", changes=[change])
    model = Tiny()
    optimize(model, plan=made)

    for _ in range(4):
        # The candidate chooses its own kernel inside of the loop's choice.
        with sdpa_kernel(SDPBackend.MATH):
            model(batch()).backward()
    plan = kpt_lightning.plan_of(model)
    assert plan is not None
    (proof,) = [each for each in plan.proofs if each.subject == "attention"]
    assert proof, proof.reason
    assert "2 calls ran on" in proof.reason


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_candidates_on_a_real_model_leave_it_right_and_never_wrong(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **sizes))
    ids = torch.randint(0, 96, (2, 24))
    data = {"input_ids": ids, "labels": ids}
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    optimize(model, data, optimizer=optimizer, level="conservative", max_seconds=60)
    assert not optimizer.state
    expected, got = plain(**data).loss, model(**data).loss
    assert torch.allclose(expected, got, rtol=1e-5)
    expected.backward()
    got.backward()
    for (name, one), two in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-3, atol=1e-6), name
    plan = kpt_lightning.plan_of(model)
    assert plan is not None
    assert {trial.candidate for trial in plan.trials} == {each.name for each in registry.candidates()}
    kpt_lightning.restore(model)
    torch.compiler.reset()
