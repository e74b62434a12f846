"""What a search keeps of what passes, and what it tells of the rest."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.errors import ConfigError, KptError
from kpt_lightning.optimize.outcome import Outcome
from kpt_lightning.optimize.search import search
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.workload import Workload
from tests.optimize.faults import FAULTS, Made, Tiny, batch, faster, set_on, subject, with_nap
from tests.optimize.searched import NAP, only, run


def loading(name: str = "loader") -> Made:
    made = Made(name, lambda model: lambda: None)
    made.stage, made.turn = Stage.INPUT, 80
    return made


def test_of_three_naps_two_are_saved_one_by_one_and_both_are_kept_together() -> None:
    first = Made("a", lambda model: faster(model, NAP / 2))
    second = Made("b", lambda model: faster(model, model.nap / 2))
    outcome = run(Tiny(nap=NAP), first, second)
    assert [change.candidate for change in outcome.changes] == ["a", "b"]
    assert outcome.whole is not None
    assert outcome.whole.gain > 2.5


def searched_then(later: Callable[[Any], Callable[[], None]], *others: Any) -> tuple[Tiny, Outcome]:
    """A search in which a change that was kept for saving the nap does something else from then on."""
    model, said = Tiny(nap=NAP), []
    made = Made(
        "tires", lambda model: later(model) if any(each.startswith("tires") for each in said) else faster(model)
    )
    work = Workload(model, batch())
    found = search(subject(model, batch()), work, max_seconds=60, pool=[*others, made], rounds=6, say=said.append)
    return model, found


def slower(model: Any) -> Callable[[], None]:
    """As code that falls back at the limit of its recompiles."""
    return faster(model, 2 * NAP)


def fails_half_way(model: Any) -> Callable[[], None]:
    model.left_over = faster(model)
    raise ValueError("not a second time")


@pytest.mark.parametrize("later", [slower, fails_half_way, with_nap(FAULTS["dropped_bias"])])
@pytest.mark.parametrize("beside", [True, False])
def test_what_does_not_last_is_dropped_by_the_measurement_of_the_whole_and_the_loader_stays(
    later: Any, beside: bool
) -> None:
    model, outcome = searched_then(later, *([loading()] if beside else []))
    assert outcome.whole is not None
    assert not outcome.whole.kept
    says = {slower: "slower in each", fails_half_way: "not a second time"}.get(later, "the numbers differ")
    *others, dropped = outcome.trials
    assert not dropped.kept
    assert dropped.gain > 1.5
    assert dropped.reason.startswith("faster, but together: ")
    assert says in dropped.reason
    assert [change.candidate for change in outcome.changes] == ["loader"] * beside
    assert [trial.kept for trial in others] == [True] * beside
    assert model.nap == NAP
    assert not hasattr(model, "left_over")


def test_data_loading_has_no_measured_gain_and_its_forecast_is_told() -> None:
    made = loading()
    made.applies = lambda subject: [Change(candidate="loader", reason="made for a test", predicted=1.5)]
    outcome = run(Tiny(), made)
    (trial,) = outcome.trials
    assert trial.kept
    assert (trial.gain, trial.low, trial.high, trial.predicted) == (None, None, None, 1.5)
    assert "1.50x expected" in trial.reason
    assert outcome.whole is not None
    assert outcome.whole.gain is None


def test_what_does_nothing_is_not_kept() -> None:
    outcome = run(Tiny(), *(Made(f"null_{number}", lambda model: lambda: None) for number in range(3)))
    assert sum(trial.kept for trial in outcome.trials) <= 1
    assert all(trial.gate.startswith("outputs inf dB") for trial in outcome.trials)


def test_memory_is_a_purpose_of_its_own_and_a_promise_is_held_against_it() -> None:
    def less(model: Any) -> Callable[[], None]:
        block = model.layers[0]
        plain = type(block).forward.__get__(block)
        again = torch.utils.checkpoint.checkpoint
        return set_on(block, "forward", lambda x: again(plain, x, use_reentrant=False))

    kept = run(Tiny(), Made("checkpoint", less, Numerics.SAME, saves_bytes=1000))
    assert [change.candidate for change in kept.changes] == ["checkpoint"]
    boast = run(Tiny(), Made("checkpoint", less, Numerics.SAME, saves_bytes=10**9))
    assert boast.changes == []
    assert "promised" in only(boast).reason


def test_a_level_below_and_a_missing_unit_are_refused_with_the_reason() -> None:
    from kpt_lightning.config import Level

    bold, foreign = Made("bold", faster), Made("foreign", faster)
    bold.level, foreign.features = Level.AGGRESSIVE, ("fp8_tensorwise",)
    outcome = run(Tiny(nap=NAP), bold, foreign)
    assert outcome.trials[0].reason == "needs level 'aggressive'"
    assert "FP8" in outcome.trials[1].reason


def test_without_time_nothing_is_tried_and_the_reason_says_so() -> None:
    outcome = run(Tiny(nap=NAP), Made("honest", faster), max_seconds=1e-6)
    assert outcome.changes == []
    assert "max_seconds" in only(outcome).reason
    assert only(outcome).ended == "no time"
    with pytest.raises(ConfigError, match="max_seconds"):
        run(Tiny(), max_seconds=0)


def test_an_optimizer_is_stepped_in_a_trial_and_all_is_put_back() -> None:
    model = Tiny()
    made = Made("optimizer", lambda model: lambda: None)
    made.stage = Stage.OPTIMIZER
    about = subject(model, batch())
    about.optimizer = torch.optim.AdamW(model.parameters())
    before = [each.clone() for each in model.parameters()]
    outcome = search(about, Workload(model, batch()), max_seconds=30, pool=[made], rounds=2)
    assert only(outcome).gain is not None
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    assert not about.optimizer.state


class Broken(Tiny):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Any) -> Any:
        loss = super().forward(x)
        if self.how == "raises":
            raise ValueError("no forward pass today")
        if self.how == "writes":
            with torch.no_grad():
                self.layers[0].up.bias.add_(1)
        return {"vector": x, "no gradient": loss.detach(), "in place": loss}.get(self.how, loss)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "no forward pass today"),
        ("vector", "scalar"),
        ("no gradient", "gradient"),
        ("writes", "own parameter"),
    ],
)
def test_a_model_that_cannot_be_tried_is_told_so_and_left_alone(how: str, says: str) -> None:
    model = Broken(how)
    with pytest.raises(KptError, match=says):
        run(model, Made("honest", faster))
    assert all(each.grad is None for each in model.parameters())


def test_dropout_does_not_hide_a_right_change_nor_a_fault() -> None:
    class Dropping(Tiny):
        def forward(self, x: Any) -> Any:
            return super().forward(nn.functional.dropout(x, 0.3, self.training))

    right = run(Dropping(nap=NAP), Made("honest", faster))
    assert [change.candidate for change in right.changes] == ["honest"]
    wrong = run(Dropping(nap=NAP), Made("fault", with_nap(FAULTS["dropped_bias"])))
    assert wrong.changes == []
