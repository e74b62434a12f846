"""The search: what is faster and right is kept, what is wrong is not, and the model shows no trace of it."""

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from kpt_lightning.candidates.float8 import Float8
from kpt_lightning.errors import KptError
from kpt_lightning.optimize.baseline import take_baseline
from kpt_lightning.optimize.search import search
from kpt_lightning.precision import float8_linear
from kpt_lightning.precision.cast import to_float8
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.workload import Workload
from tests.optimize.faults import FAULTS, Made, Tiny, batch, faster, set_on, subject, with_nap
from tests.optimize.searched import NAP, only, run


def test_what_is_right_and_faster_is_kept_with_its_gain() -> None:
    outcome = run(Tiny(nap=NAP), Made("honest", faster))
    assert [change.candidate for change in outcome.changes] == ["honest"]
    trial = only(outcome)
    assert trial.kept
    assert trial.gain is not None
    assert 1.5 < trial.low <= trial.gain <= trial.high
    assert outcome.whole is not None
    assert outcome.whole.kept
    assert outcome.whole.low <= outcome.whole.gain <= outcome.whole.high
    assert outcome.whole.expect_low <= outcome.whole.gain <= outcome.whole.expect_high


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_rejected_however_fast_it_is(fault: str) -> None:
    outcome = run(Tiny(nap=NAP), Made(fault, with_nap(FAULTS[fault])))
    assert outcome.changes == []
    assert only(outcome).reason.startswith("numbers differ"), only(outcome)


@pytest.mark.parametrize(("factor", "right"), [(1, True), (2, False), (0.5, False)])
def test_an_fp8_scale_off_by_two_is_rejected_and_a_right_one_passes_every_gate(
    monkeypatch: pytest.MonkeyPatch, factor: float, right: bool
) -> None:
    def scaled(*args: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        values, scale = to_float8(*args, **more)
        return values, scale * factor

    monkeypatch.setattr(float8_linear, "to_float8", scaled)
    settings = {"precision": "fp8", "float8": {"emulate": True, "only_where_it_pays": False, "recipe": "tensorwise"}}
    about = subject(Tiny(), batch(), **settings)
    outcome = search(about, Workload(about.model, batch()), max_seconds=60, pool=[Float8()], rounds=1)
    for trial in outcome.trials:
        assert trial.reason.startswith("numbers differ: ") is not right, trial
        assert trial.gain is not None or not right


def crash(model: nn.Module) -> Callable[[], None]:
    raise ZeroDivisionError("boom")


def out_of_memory(model: nn.Module) -> Callable[[], None]:
    def forward(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    return set_on(model, "forward", forward)


def no_compiler(model: Any) -> Callable[[], None]:
    def backend(graph: Any, inputs: Any) -> None:
        raise RuntimeError("no compiler here")

    return set_on(model, "forward", torch.compile(type(model).forward.__get__(model), backend=backend))


@pytest.mark.parametrize("failure", [crash, out_of_memory, no_compiler])
def test_a_failing_candidate_is_a_rejection_and_the_next_one_is_tried(failure: Any) -> None:
    model = Tiny(nap=NAP)
    first = Made("a", failure)
    first.turn = 1
    outcome = run(model, first, Made("b", faster))
    assert outcome.trials[0].reason.startswith("failed")
    assert [change.candidate for change in outcome.changes] == ["b"]


class Square(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square()


def undo_fails(model: Any) -> Callable[[], None]:
    model.layers[0].up.__class__ = Square
    model.layers[1].forward = lambda x: x
    model.layers[1].register_forward_hook(lambda module, args, output: output * 0)

    def undo() -> None:
        raise ValueError("cannot undo")

    return undo


def half_applied(model: Any) -> Callable[[], None]:
    model.layers[0].up.__class__ = Square
    model.layers[1].up.weight.requires_grad_(False)
    del model.layers[1].up.bias
    raise ValueError("cannot go on")


def undo_forgets(model: Any) -> Callable[[], None]:
    model.layers[1].again = True
    return faster(model)


@pytest.mark.parametrize("fault", [undo_fails, half_applied, undo_forgets])
@pytest.mark.parametrize("numerics", [Numerics.ROUNDING, Numerics.PRECISION])
def test_what_a_bad_undo_leaves_is_put_back_and_the_next_candidate_sees_the_model_as_it_was(
    fault: Any, numerics: Numerics
) -> None:
    model = Tiny(nap=NAP)
    first = Made("bad", fault, numerics)
    first.turn = 1
    kinds, names = [type(each) for each in model.modules()], [sorted(vars(each)) for each in model.modules()]
    before = [(name, id(each), each.requires_grad) for name, each in model.named_parameters()]
    outcome = run(model, first, Made("honest", faster))
    assert outcome.trials[0].ended == "failed"
    assert outcome.trials[0].reason.startswith("failed: ")
    assert [change.candidate for change in outcome.changes] == ["honest"]
    assert outcome.trials[1].gate.startswith("outputs inf dB")
    assert [type(each) for each in model.modules()] == kinds
    assert [sorted(vars(each)) for each in model.modules()] == names
    assert [(name, id(each), each.requires_grad) for name, each in model.named_parameters()] == before
    assert not any(each._forward_hooks for each in model.modules())


def test_an_undo_that_leaves_something_is_told_by_its_name() -> None:
    assert "'s undo" not in only(run(Tiny(), Made("bad", faster), rounds=1)).reason
    reason = only(run(Tiny(nap=NAP), Made("bad", undo_forgets))).reason
    assert reason == "failed: its undo leaves layers.1.again changed"


@pytest.mark.parametrize("half", [False, True])
def test_weights_that_a_candidate_has_lost_end_the_search_with_what_to_do(half: bool) -> None:
    def loses(model: Any) -> Callable[[], None]:
        model.layers[0].up.weight.data = (
            model.layers[0].up.weight.data.to(torch.bfloat16 if half else torch.float32) * 2
        )
        raise ValueError("cannot go on")

    with pytest.raises(KptError, match=r"values of weights.*could not be put back. Make the model anew"):
        run(Tiny(), Made("loses", loses))


def crashes_on_other_rows(model: Any, error: Exception) -> Callable[[], None]:
    """Passes its trial; a loss run draws rows anew."""
    plain = type(model).forward.__get__(model)

    def forward(x: Any) -> Any:
        if not torch.equal(x, batch()):
            raise error
        return plain(x)

    undo, awake = set_on(model, "forward", forward), faster(model)

    def both() -> None:
        awake()
        undo()

    return both


@pytest.mark.parametrize("error", [ValueError("cannot train"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_crash_of_the_loss_run_is_a_rejection_and_the_search_goes_on(error: Exception) -> None:
    model = Tiny(nap=NAP)
    first = Made("late", lambda model: crashes_on_other_rows(model, error), Numerics.PRECISION)
    first.turn = 1
    outcome = run(model, first, Made("honest", faster))
    assert outcome.trials[0].ended == "failed", outcome.trials[0]
    assert outcome.trials[0].gain is not None
    assert str(error) in outcome.trials[0].reason
    assert [change.candidate for change in outcome.changes] == ["honest"]


def test_a_change_without_room_for_a_new_baseline_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny(nap=NAP)
    taken: list[int] = []

    def one_baseline(*args: Any) -> Any:
        # The second is taken with the change in force; no machine has too little memory at that very moment.
        taken.append(1)
        if len(taken) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return take_baseline(*args)

    monkeypatch.setattr("kpt_lightning.optimize.search.take_baseline", one_baseline)
    first = Made("large", faster, Numerics.PRECISION)
    first.turn = 1
    outcome = run(model, first, Made("honest", faster))
    assert outcome.trials[0].ended == "failed"
    assert "OutOfMemoryError" in outcome.trials[0].reason
    assert [change.candidate for change in outcome.changes] == ["honest"]


def interrupted(model: nn.Module) -> Callable[[], None]:
    def forward(*args: Any) -> None:
        raise KeyboardInterrupt

    return set_on(model, "forward", forward)


class Busy(Tiny):
    """Everything that a pass may leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.calls, self.seen = 0, []

    def forward(self, x: Any) -> Any:
        self.calls += 1
        self.seen.append(float(x.sum()))
        return super().forward(self.dropout(self.batch_norm(x)) * (1 + 0.01 * random.random()))


def everything(model: nn.Module) -> list[Any]:
    return [
        [(name, each.clone()) for name, each in model.state_dict().items()],
        [(id(each), each.requires_grad) for each in model.parameters()],
        [None if each.grad is None else each.grad.clone() for each in model.parameters()],
        [(type(module), module.training, sorted(vars(module))) for module in model.modules()],
        [list(module._forward_hooks.items()) for module in model.modules()],
        (model.calls, list(model.seen)),
        (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()),
    ]  # fmt: skip


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


NOTHING = Made("honest", lambda model: lambda: None)


SAVED = Made("honest", faster)


COARSE = Made("coarse", faster, Numerics.PRECISION)


SMALL = Made("small", lambda model: lambda: None, Numerics.SAME, saves_bytes=1)


@pytest.mark.parametrize(
    "candidates", [[NOTHING], [SAVED, NOTHING], [COARSE, NOTHING], [SMALL], [Made("crash", crash)]]
)
def test_the_model_and_all_random_states_are_bit_identical_afterwards(candidates: Any) -> None:
    model = Busy()
    model.nap = 0.01
    model.layers[0].register_forward_hook(lambda module, args, output: output + model.batch_norm.weight.sum())
    model.register_buffer("unused", torch.arange(3.0))
    model.layers[0].up.weight.requires_grad_(False)
    model.layers[1].eval()
    model(batch()).backward()
    before = everything(model)
    outcome = run(model, *candidates)
    assert candidates[0] not in (SAVED, COARSE) or outcome.trials[0].gate
    assert same(before, everything(model))


def test_ctrl_c_in_a_trial_ends_the_search_and_leaves_the_model_as_it_was() -> None:
    model = Busy()
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, Made("interrupted", interrupted))
    assert same(before, everything(model))
