"""bf16 autocast as a change: proposed where nobody else sets precision, and gone without trace."""

from typing import Any

import pytest
import torch
from torch import nn

from kpt_lightning.candidates.autocast_bf16 import CANDIDATE
from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig, Level
from kpt_lightning.decision import Rejected
from kpt_lightning.hardware import detect
from kpt_lightning.optimize.apply import applied
from kpt_lightning.validation.gates import Numerics

CPU = torch.device("cpu")


def subject(model: nn.Module, **known: Any) -> Subject:
    given = {"owns_precision": True, "compute_dtype": torch.float32} | known
    return Subject(model=model, profile=detect(), config=KptConfig(), device=CPU, **given)


def test_it_is_a_candidate_that_changes_precision_and_needs_bf16_units() -> None:
    assert isinstance(CANDIDATE, Candidate)
    assert CANDIDATE.numerics is Numerics.PRECISION
    assert CANDIDATE.level is Level.BALANCED
    assert CANDIDATE.features == ("bf16",)


def test_it_is_proposed_for_a_model_in_fp32_that_nobody_drives() -> None:
    (change,) = CANDIDATE.applies(subject(nn.Linear(2, 2)))
    assert change == Change(candidate="autocast_bf16", reason="matrix products in bf16, fp32 weights")


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"owns_precision": False}, "the trainer is in charge of precision; set precision='bf16-mixed' there"),
        ({"compute_dtype": torch.bfloat16}, "the model runs in torch.bfloat16 already"),
        ({"compute_dtype": torch.float64}, "the model runs in torch.float64 already"),
    ],
)
def test_it_is_declined_with_the_reason(known: dict[str, Any], reason: str) -> None:
    (verdict,) = CANDIDATE.applies(subject(nn.Linear(2, 2), **known))
    assert verdict == Rejected("autocast_bf16", reason)


def test_products_run_in_bf16_while_it_is_applied_and_not_afterwards() -> None:
    model = nn.Linear(4, 4)
    known, x = subject(model), torch.ones(1, 4)
    state = CANDIDATE.apply(known, {})
    assert known.compute_dtype is torch.bfloat16
    with known.forward_context():
        assert model(x).dtype is torch.bfloat16
    CANDIDATE.undo(known, state)
    assert known.compute_dtype is torch.float32
    assert known.contexts == []
    with known.forward_context():
        assert model(x).dtype is torch.float32
    assert model.weight.dtype is torch.float32


def test_it_goes_around_the_contexts_of_others_and_takes_away_its_own_alone() -> None:
    known = subject(nn.Linear(2, 2))
    seen: list[bool] = []

    def other() -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch.enable_grad()

    known.contexts.append(other)
    state = CANDIDATE.apply(known, {})
    with known.forward_context():
        pass
    CANDIDATE.undo(known, state)
    assert known.contexts == [other]
    assert seen == [True]


def test_it_is_undone_where_a_later_change_fails() -> None:
    known = subject(nn.Linear(2, 2))
    changes = [Change(candidate="autocast_bf16"), Change(candidate="compile_blocks", setting={"blocks": ["gone"]})]

    def apply() -> None:
        with applied(known, changes):
            pass

    with pytest.raises(ValueError, match="gone"):
        apply()
    assert (known.contexts, known.compute_dtype, known.applied, known.key) == ([], torch.float32, [], "")


def test_it_is_replayed_without_a_batch() -> None:
    known = subject(nn.Linear(2, 2), batch=None)
    with applied(known, [Change.from_dict(CANDIDATE.applies(known)[0].to_dict())]):  # type: ignore[union-attr]
        assert known.applied == ["autocast_bf16"]
        assert len(known.contexts) == 1
    assert known.contexts == []
