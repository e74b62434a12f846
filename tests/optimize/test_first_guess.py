"""What rules would do is tried first, as one: kept with its gain, or dropped without a trace; then all in turn."""

from typing import Any

import pytest
import torch

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.hardware import detect
from kpt_lightning.optimize.first_guess import RULES, guess
from kpt_lightning.optimize.outcome import Outcome
from kpt_lightning.optimize.rules import on_device
from kpt_lightning.optimize.search import search
from kpt_lightning.validation.workload import Workload
from tests.optimize.faults import FAULTS, Made, Tiny, batch, faster, subject, with_nap
from tests.optimize.searched import NAP
from tests.optimize.started import EMULATED, llama, state
from tests.optimize.started import batch as tokens


def searched(model: Tiny, *candidates: Made, names: tuple[str, ...], max_seconds: float = 60.0) -> Outcome:
    def first() -> list[Change]:
        return [Change(candidate=name, reason="by rules") for name in names]

    about, work = subject(model, batch()), Workload(model, batch())
    return search(about, work, max_seconds=max_seconds, first=first, pool=candidates, rounds=6)


def test_a_right_guess_is_kept_as_one_and_the_others_are_tried_on_top_of_it() -> None:
    half, same = Made("half", lambda model: faster(model, NAP / 2)), Made("same", lambda model: lambda: None)
    rest = Made("rest", lambda model: faster(model))
    outcome = searched(Tiny(nap=NAP), half, same, rest, names=("half", "same"))
    assert [change.candidate for change in outcome.changes] == ["half", "same", "rest"]
    assert [trial.candidate for trial in outcome.trials] == [RULES, "half", "same", "rest"]
    guessed, *parts, last = outcome.trials
    assert guessed.what == "half, same"
    assert guessed.gain > 1.5
    assert all(part.kept and part.gain is None and RULES in part.reason for part in parts)
    assert last.kept
    assert outcome.whole.gain > last.gain > 1.5


@pytest.mark.parametrize("fault", ["dropped_bias", "wrong_epsilon"])
def test_a_guess_with_a_fault_in_it_is_dropped_and_each_part_is_tried_alone(fault: str) -> None:
    good, wrong = Made("good", lambda model: faster(model)), Made("wrong", with_nap(FAULTS[fault]))
    model = Tiny(nap=NAP)
    outcome = searched(model, good, wrong, names=("good", "wrong"))
    assert [change.candidate for change in outcome.changes] == ["good"]
    guessed, first, second = outcome.trials
    assert guessed.reason.startswith("numbers differ")
    assert (first.candidate, first.kept, second.kept) == ("good", True, False)
    assert model.nap == NAP


def test_a_guess_that_is_not_faster_is_dropped() -> None:
    outcome = searched(Tiny(nap=NAP), Made("same", lambda model: lambda: None), names=("same",))
    assert outcome.changes == []
    assert not any(trial.kept for trial in outcome.trials)


def test_without_time_nothing_is_guessed() -> None:
    outcome = searched(Tiny(nap=NAP), Made("good", lambda model: faster(model)), names=("good",), max_seconds=1e-9)
    assert outcome.changes == []
    assert RULES not in [trial.candidate for trial in outcome.trials]


def looked_at(model: Any, dtype: torch.dtype, **settings: Any) -> Subject:
    config = KptConfig.build({"precision": "fp8", "float8": EMULATED} | settings)
    return Subject(
        model=model, profile=on_device(detect(), "cpu"), config=config, device=torch.device("cpu"), compute_dtype=dtype
    )


KNOWN = {"float8", "float8_mlp", "float8_siblings", "float8_cross_entropy", "compile_loss"}


@pytest.mark.parametrize(
    ("dtype", "level", "known", "names"),
    [
        (torch.bfloat16, "balanced", KNOWN, ["float8", "float8_mlp", "float8_siblings"]),
        (torch.bfloat16, "aggressive", KNOWN, ["float8", "float8_cross_entropy", "float8_mlp", "float8_siblings"]),
        (torch.bfloat16, "balanced", {"float8"}, ["float8"]),
        # Without autocast the model's own products are fp32, which a trial does not change by itself.
        (torch.float32, "balanced", KNOWN, []),
    ],
)
def test_the_guess_is_what_rules_and_proofs_say_for_this_precision(
    dtype: torch.dtype, level: str, known: set[str], names: list[str]
) -> None:
    model = llama()
    about = looked_at(model, dtype, level=level)
    before = state(model)
    work = Workload(model, tokens(), None)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = guess(about, work, known)
    assert [change.candidate for change in found] == names
    assert state(model) == before


def test_what_rules_refuse_outright_leaves_the_search_to_the_candidates() -> None:
    model = llama()
    config = KptConfig.build({"precision": "fp8"})
    about = Subject(model=model, profile=on_device(detect(), "cpu"), config=config, device=torch.device("cpu"))
    assert guess(about, Workload(model, tokens(), None), KNOWN) == []
