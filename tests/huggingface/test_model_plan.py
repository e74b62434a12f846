from typing import Any

import pytest
import torch
from torch import nn

from kpt_lightning.config import KptConfig
from kpt_lightning.huggingface.model_plan import plan_for
from kpt_lightning.huggingface.surroundings import Surroundings
from tests.huggingface.conftest import FP8
from tests.huggingface.tiny import llama


def around(precision: str = "32", *, compiles: bool = False) -> Surroundings:
    return Surroundings("single", precision, compiles, torch.device("cpu"), 1)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_fp8_goes_on_top_of_either_precision(precision: str) -> None:
    plan = plan_for(llama(), KptConfig.build(FP8), around(precision))
    assert plan.precision == "fp8"
    assert len(plan.float8_layers) == 14


@pytest.mark.parametrize(
    ("precision", "settings", "used"),
    [
        ("bf16-mixed", {}, "bf16-mixed"),
        ("bf16-mixed", {"level": "conservative"}, "bf16-mixed"),
        ("32", {"level": "conservative"}, "32"),
        ("16-mixed", {}, "16-mixed"),
        ("32", {"precision": "bf16-mixed"}, "bf16-mixed"),
    ],
)
def test_accelerates_precision_stays_where_there_is_no_fp8(precision: str, settings: dict[str, Any], used: str) -> None:
    assert plan_for(llama(), KptConfig.build(settings), around(precision)).precision == used


def test_nothing_is_compiled_beside_accelerates_own_compile() -> None:
    plan = plan_for(llama(), KptConfig.build(FP8), around("bf16-mixed", compiles=True))
    assert plan.precision == "fp8"
    for subject in ("compile blocks", "compile loss"):
        (decision,) = plan.explain(subject)
        assert not decision
        assert "Accelerate compiles the whole model" in decision.reason


def test_no_autocast_of_ours_around_what_accelerate_compiles() -> None:
    assert plan_for(nn.Linear(16, 16), KptConfig(), around("32", compiles=True)).precision == "32"
