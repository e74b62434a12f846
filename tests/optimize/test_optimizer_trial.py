"""Changes of the optimizer: judged by the weights that it leaves, and tried without a trace."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from kpt_lightning.candidates.candidate import Stage
from kpt_lightning.candidates.fused_optimizer import FusedOptimizer
from kpt_lightning.optimize.outcome import Outcome
from kpt_lightning.optimize.search import search
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.workload import Workload
from tests.optimize.faults import Made, Tiny, batch, faster, subject

NAP = 0.03
Fault = Callable[[Optimizer], None]


class OnOptimizer(Made):
    """Changes the optimizer and, so that only its numbers can turn it down, saves a nap."""

    def __init__(self, fault: Fault, numerics: Numerics = Numerics.ROUNDING, stage: Stage = Stage.OPTIMIZER) -> None:
        super().__init__("optimizer", faster, numerics)
        self.stage, self._fault = stage, fault

    def apply(self, subject: Any, setting: Any) -> Any:
        optimizer = subject.optimizer
        groups, kind = [dict(group) for group in optimizer.param_groups], type(optimizer)
        self._fault(optimizer)
        return super().apply(subject, setting), groups, kind

    def undo(self, subject: Any, applied: Any) -> None:
        awake, groups, kind = applied
        for group, before in zip(subject.optimizer.param_groups, groups, strict=True):
            group.update(before)
        subject.optimizer.__class__ = kind
        awake()


def run(made: Sequence[Made], optimizer: Callable[[Any], Optimizer], model: Any = None, rounds: int = 6) -> Outcome:
    model = Tiny(nap=NAP) if model is None else model
    about = subject(model, batch())
    about.optimizer = optimizer(model)
    return search(about, Workload(model, batch()), max_seconds=60, pool=made, rounds=rounds)


def uphill(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = -1000.0


def half_the_rate(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.5


def without_decay(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0


def without_momentum(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["momentum"] = 0.0


class Forgetful(Adam):
    """Right in its first step, and every step is its first."""

    def step(self, closure: Any = None) -> Any:
        self.state.clear()
        return super().step(closure)


def forgets(optimizer: Optimizer) -> None:
    optimizer.__class__ = Forgetful


class Standing(Adam):
    def step(self, closure: Any = None) -> None:
        """No step at all."""


def stands_still(optimizer: Optimizer) -> None:
    optimizer.__class__ = Standing


def nothing(optimizer: Optimizer) -> None:
    """An honest change."""


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=1e-3)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-3, momentum=0.9)


def warming_up(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=0.0)


def hardly_moving(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=1e-9)


FAULTS: list[tuple[Fault, Callable[[Any], Optimizer]]] = [
    (uphill, adam),
    (uphill, sgd),
    (uphill, warming_up),
    (half_the_rate, adam),
    (half_the_rate, hardly_moving),
    (half_the_rate, sgd),
    (forgets, adam),
    (stands_still, adam),
    (without_momentum, sgd),
    (without_decay, lambda model: AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)),
]


@pytest.mark.parametrize(("fault", "optimizer"), FAULTS)
def test_an_optimizer_that_steps_otherwise_is_rejected_however_fast_it_is(fault: Fault, optimizer: Any) -> None:
    outcome = run([OnOptimizer(fault)], optimizer)
    (trial,) = outcome.trials
    assert outcome.changes == []
    assert trial.reason.startswith("numbers differ: 3 steps move "), trial


@pytest.mark.parametrize("fault", [uphill, stands_still])
@pytest.mark.parametrize("stage", [Stage.OPTIMIZER, Stage.WEIGHTS])
def test_with_fewer_bits_it_is_rejected_by_its_updates_or_by_its_loss(fault: Fault, stage: Stage) -> None:
    outcome = run([OnOptimizer(fault, Numerics.PRECISION, stage)], adam)
    (trial,) = outcome.trials
    assert outcome.changes == []
    assert trial.reason.startswith("numbers differ" if stage is Stage.OPTIMIZER else "trains worse"), trial


@pytest.mark.parametrize("optimizer", [adam, sgd, warming_up, hardly_moving])
@pytest.mark.parametrize("numerics", [Numerics.ROUNDING, Numerics.PRECISION])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_optimizer_that_steps_alike_is_kept(optimizer: Any, numerics: Numerics, dtype: torch.dtype) -> None:
    model = Tiny(nap=NAP).to(dtype)
    about = subject(model, batch().to(dtype), precision="auto")
    about.optimizer, about.compute_dtype = optimizer(model), dtype
    work = Workload(model, about.batch)
    outcome = search(about, work, max_seconds=60, pool=[OnOptimizer(nothing, numerics)], rounds=6)
    assert [change.candidate for change in outcome.changes] == ["optimizer"], outcome.trials
    assert "alike, inf dB" in outcome.trials[0].gate or numerics is Numerics.PRECISION


@pytest.mark.parametrize("kind", [Adam, AdamW, SGD])
@pytest.mark.parametrize("rate", [1e-3, 1e-7])
def test_fused_kernels_pass_the_gate_of_steps(kind: Any, rate: float) -> None:
    outcome = run([FusedOptimizer()], lambda model: kind(model.parameters(), lr=rate), Tiny(), rounds=1)
    (trial,) = outcome.trials
    assert "steps move each weight alike" in trial.gate, trial


class Average:
    """A user's running average of weights, updated by a hook of the optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.updates = model, 0

    def __call__(self, *args: Any) -> None:
        self.updates += 1


def counting(optimizer: Optimizer, steps: list[int]) -> None:
    plain = optimizer.step

    def step(*args: Any, **more: Any) -> Any:
        steps.append(1)
        return plain(*args, **more)

    vars(optimizer)["step"] = step


class Temperature(nn.Module):
    """A loss that learns, counts, and is no part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        self.calls += 1
        loss: Tensor = model(x) * self.scale + self.scale.square()
        return loss


@pytest.mark.parametrize("stage", [Stage.OPTIMIZER, Stage.WEIGHTS, Stage.MODULES])
@pytest.mark.parametrize("how", ["module", "closure", "method"])
@pytest.mark.parametrize("optimized", [True, False])
def test_hooks_schedulers_and_a_loss_that_learns_are_bit_for_bit_what_they_were(
    stage: Stage, how: str, optimized: bool
) -> None:
    model, loss = Tiny(nap=NAP), Temperature()
    rows = batch().requires_grad_()
    optimizer = AdamW([{"params": model.parameters()}, {"params": loss.parameters()} if optimized else {"params": []}])
    average, everywhere, steps = Average(model), Average(model), []
    optimizer.register_step_post_hook(average)
    LambdaLR(optimizer, lambda step: 0.1)
    counting(optimizer, steps)
    functions: dict[str, Any] = {
        "module": loss, "closure": lambda model, batch: loss(model, batch), "method": loss.forward,
    }  # fmt: skip
    loss.scale.grad, rows.grad = torch.full((), 3.0), torch.ones_like(rows)
    grads = loss.scale.grad, rows.grad
    names, groups = sorted(vars(optimizer)), [dict(group) for group in optimizer.param_groups]
    step = vars(optimizer)["step"]
    weights = [each.detach().clone() for each in (*model.parameters(), *loss.parameters())]
    handle = register_optimizer_step_post_hook(everywhere)
    try:
        about = subject(model, rows)
        about.optimizer = optimizer
        numerics = Numerics.PRECISION if stage is Stage.WEIGHTS else Numerics.ROUNDING
        made = OnOptimizer(half_the_rate if stage is Stage.WEIGHTS else nothing, numerics, stage)
        outcome = search(about, Workload(model, rows, functions[how]), max_seconds=60, pool=[made], rounds=6)
    finally:
        handle.remove()
    assert outcome.trials[0].gain is not None, outcome.trials
    assert average.updates == everywhere.updates == len(steps) == 0
    assert sorted(vars(optimizer)) == names
    assert vars(optimizer)["step"] is step
    assert len(optimizer._optimizer_step_post_hooks) == 1
    assert not optimizer.state
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert loss.calls == 0
    assert loss.scale.grad is grads[0]
    assert rows.grad is grads[1]
    assert loss.scale.grad == 3.0
    assert bool(rows.grad.eq(1).all())
    after = (*model.parameters(), *loss.parameters())
    assert all(torch.equal(one, two) for one, two in zip(weights, after, strict=True))
