"""Head and loss in FP8 as one: at the aggressive level, with the numbers of FP8, and undone without a trace."""

from typing import Any

import pytest
import torch
from torch import nn

from kpt_lightning.candidates import float8_cross_entropy, linear_cross_entropy
from kpt_lightning.candidates.candidate import Candidate, Change, SelfChecking
from kpt_lightning.candidates.float8_cross_entropy import CANDIDATE
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig, Level
from kpt_lightning.decision import Rejected
from kpt_lightning.hardware import detect
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.validation.calls import record_calls
from kpt_lightning.validation.numerics import sqnr_db
from tests.candidates.float8_llama import gradients, llama, passes


def subject(model: nn.Module, run: Any, **section: Any) -> Subject:
    config = KptConfig.build({"precision": "fp8", "level": "aggressive", "float8": {"emulate": True} | section})
    device = next(model.parameters()).device
    return Subject(
        model=model, profile=detect(), config=config, device=device, compute_dtype=torch.bfloat16,
        calls=record_calls(model, run),
    )  # fmt: skip


def test_it_is_a_candidate_that_checks_itself_and_changes_the_head_only_where_that_is_allowed() -> None:
    assert isinstance(CANDIDATE, Candidate)
    assert isinstance(CANDIDATE, SelfChecking)
    assert CANDIDATE.level is Level.AGGRESSIVE
    # Or the loss function is taken already.
    assert CANDIDATE.turn < linear_cross_entropy.CANDIDATE.turn


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("place", [0, 1])
def test_loss_and_gradients_are_those_of_the_model_to_fp8_and_undo_leaves_no_trace(tied: bool, place: int) -> None:
    model = llama(tie_word_embeddings=tied)
    run = passes(model)
    exact = gradients(model, run)
    about = subject(model, run)
    before = [(name, type(each), sorted(vars(each))) for name, each in model.named_modules()]
    changes = list(CANDIDATE.applies(about))
    assert [each.setting["grad_weight"] for each in changes if isinstance(each, Change)] == ["fp8", "bf16"]
    assert [each.fallback for each in changes if isinstance(each, Change)] == [False, True]
    applied = CANDIDATE.apply(about, changes[place].setting)
    with count_gemms() as counts:
        found = gradients(model, run)
    assert counts.total == (3, 2)[place]
    assert found["loss"] == pytest.approx(float(exact["loss"]), rel=2e-2)
    assert all(sqnr_db(each, found[name]) > 15 for name, each in exact.items())
    verdict = CANDIDATE.check(about, run)
    assert verdict, verdict.reason
    CANDIDATE.undo(about, applied)
    assert [(name, type(each), sorted(vars(each))) for name, each in model.named_modules()] == before
    again = gradients(model, run)
    assert all(torch.equal(each, again[name]) for name, each in exact.items())


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_gradients_off_by_two_are_rejected(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    model = llama()
    run = passes(model)
    about = subject(model, run)
    CANDIDATE.apply(about, CANDIDATE.applies(about)[0].setting)  # type: ignore[union-attr]
    right = float8_cross_entropy.float8_linear_cross_entropy

    def off(hidden: Any, weight: Any, *rest: Any, **options: Any) -> Any:
        loss = right(hidden, weight, *rest, **options)
        return loss * factor - loss.detach() * (factor - 1)

    monkeypatch.setattr(float8_cross_entropy, "float8_linear_cross_entropy", off)
    verdict = CANDIDATE.check(about, run)
    assert not verdict
    assert "gradient" in verdict.reason


@pytest.mark.parametrize(
    ("section", "config", "reason"),
    [
        ({"exclude": ("*head",)}, {}, "named in float8.exclude"),
        ({}, {"precision": "bf16-mixed"}, "was asked for"),
        ({"emulate": False}, {}, ""),
    ],
)
def test_what_the_user_or_the_machine_rules_out_is_told(section: Any, config: Any, reason: str) -> None:
    model = llama()
    about = subject(model, passes(model), **section)
    about.config = about.config.model_copy(update=config)
    (found,) = CANDIDATE.applies(about)
    assert isinstance(found, Rejected)
    assert reason in found.reason
