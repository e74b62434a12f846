"""Tables and snippets of the documentation are those of the code."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kpt_lightning import auto_optimize, plan_of, restore
from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Candidate, Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig, Level
from kpt_lightning.decision import Rejected
from kpt_lightning.hardware import detect
from kpt_lightning.measure import interleave
from kpt_lightning.optimize.trial import NEGLIGIBLE
from kpt_lightning.validation import gates, loss_run, parity
from kpt_lightning.validation import model as validate
from kpt_lightning.validation.gates import Numerics, gate

DOCS = Path(__file__).parents[2] / "docs"
AUTO, VALIDATION = ((DOCS / name).read_text(encoding="utf-8") for name in ("auto_optimize.md", "validation.md"))


def rows(text: str, head: str) -> list[list[str]]:
    """Cells of the table whose head row begins with ``head``."""
    table = text.split(f"\n| {head} |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def small() -> dict[str, Any]:
    """What the snippets leave to the reader."""
    torch.manual_seed(0)
    model, reference = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), None
    return {
        "model": model, "reference": reference, "batch": (torch.randn(4, 8), torch.randint(2, (4,))),
        "loss_fn": nn.functional.cross_entropy, "optimizer": torch.optim.AdamW(model.parameters()), "torch": torch,
        "auto_optimize": auto_optimize, "plan_of": plan_of, "restore": restore,
    }  # fmt: skip


def test_the_table_of_candidates_has_each_of_them_with_its_attributes_in_the_order_of_turns() -> None:
    told = [[row[0].strip("`"), *row[1:5]] for row in rows(AUTO, "candidate")]
    own = [
        [each.name, each.level.value, each.stage.name.lower(), each.numerics.value,
         ", ".join([*each.features, *(package.distribution for package in each.packages)])]
        for each in registry.candidates()
    ]  # fmt: skip
    assert told == own


def test_the_table_of_gates_has_the_figures_of_the_code() -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    told = {row[0]: row[1:] for row in rows(AUTO, "numbers")}
    for kind in (Numerics.SAME, Numerics.ROUNDING):
        limits = [gate(kind, dtype) for dtype in dtypes]
        assert [f"{each.output_db:g}" for each in limits] == told[kind.value][:4]
        assert told[kind.value][4].startswith(f"{limits[0].spreads:g} times")
    bits = gate(Numerics.PRECISION, torch.bfloat16)
    assert (bits.output_db, bits.gradient_db, bits.median_gradient_db, bits.layer_db) == (6, 0, 5, 15)
    assert "6 dB for loss and outputs, 0 dB for each gradient, 5 dB for the median gradient, and 15 dB" in AUTO.replace(
        "\n", " "
    )
    assert f"by {gates.FP8_SPREADS:g} times what that noise moves it, bf16 by 4 times" in AUTO
    assert (loss_run.STEPS, len(loss_run.SEEDS), bits.loss_spreads) == (8, 3, 2)
    assert (loss_run._LEAST, loss_run._MOST) == (0.1, 0.25)
    assert "8 steps from the present weights with each of 3 seeds" in AUTO


def test_the_text_has_the_constants_of_timing_and_parity() -> None:
    assert (interleave.ROUNDS, interleave.SLOW_ROUNDS, interleave.SLOW_SECONDS) == (11, 7, 0.1)
    assert (interleave._LEAST_SECONDS, interleave._HOPELESS, NEGLIGIBLE) == (0.05, 4, 1.005)
    assert (gates.PARITY_FACTOR, gates.PARITY_ULPS, parity.SCALES) == (4, 16, (1, 30, 1e-3, 0))


def test_the_table_of_checks_has_each_check_of_a_model() -> None:
    from kpt_lightning import validate_model

    known = small()
    found = validate_model(known["model"], known["batch"], loss_fn=known["loss_fn"], reference=small()["model"])
    assert [row[0].strip("`") for row in rows(VALIDATION, "check")] == [each.subject for each in found]
    assert f"`gradient_limit={validate.GRADIENT_LIMIT:g}`" in VALIDATION


@pytest.mark.parametrize("number", range(len(blocks(VALIDATION))))
def test_a_snippet_of_validation_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks(VALIDATION)[number], small())
    assert "ok" in capsys.readouterr().out


def test_the_candidate_of_the_text_is_one_and_leaves_no_trace() -> None:
    names: dict[str, Any] = {
        "torch": torch, "Level": Level, "Stage": Stage, "Numerics": Numerics, "Rejected": Rejected, "Change": Change
    }  # fmt: skip
    exec(blocks(AUTO)[-1], names)
    candidate = names["CANDIDATE"]
    assert isinstance(candidate, Candidate)
    subject = Subject(model=nn.Linear(2, 2), profile=detect(), config=KptConfig(), device=torch.device("cpu"))
    (change,) = candidate.applies(subject)
    applied = candidate.apply(subject, change.setting)
    assert torch.get_float32_matmul_precision() == "high"
    (refused,) = candidate.applies(subject)
    assert not refused
    candidate.undo(subject, applied)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.slow
def test_the_plain_loop_of_the_text_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks(AUTO)[1], small())
    assert capsys.readouterr().out.startswith("32, single, on ")
