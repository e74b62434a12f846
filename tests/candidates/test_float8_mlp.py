"""MLPs in FP8 become one module each, with the numbers of FP8, and nothing else does."""

from typing import Any

import pytest
import torch
from torch import nn

from kpt_lightning.candidates.candidate import Candidate, Change, SelfChecking
from kpt_lightning.candidates.float8_mlp import CANDIDATE
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.precision import float8_gated
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.validation.numerics import sqnr_db
from tests.candidates.float8_llama import gradients, in_float8, llama, passes

pytestmark = pytest.mark.usefixtures("every_size")


def only(found: Any) -> Any:
    (one,) = found
    return one


def test_it_is_a_candidate_that_checks_itself() -> None:
    assert isinstance(CANDIDATE, Candidate)
    assert isinstance(CANDIDATE, SelfChecking)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_all_mlps_are_proposed_run_as_one_each_and_undo_leaves_no_trace(activation: str) -> None:
    model = llama(hidden_act=activation)
    run = passes(model)
    exact = gradients(model, run)
    subject = in_float8(model, run)
    layers = gradients(model, run)
    before = [(name, type(each), sorted(vars(each))) for name, each in model.named_modules()]
    change = only(CANDIDATE.applies(subject))
    assert isinstance(change, Change)
    assert change.reason.startswith("2 gated MLPs")
    applied = CANDIDATE.apply(subject, change.setting)
    with count_gemms() as counts:
        fused = gradients(model, run)
    # Per block: four layers of attention, and of the MLP two GEMMs a direction for three layers.
    assert (counts.launched, counts.total) == (2 * 3 * 6, 2 * 3 * 7)
    for name, each in exact.items():
        assert sqnr_db(each, fused[name]) > min(20.0, sqnr_db(each, layers[name])) - 3
    verdict = CANDIDATE.check(subject, run)
    assert verdict, verdict.reason
    assert "2 of 2 looked at" in verdict.reason
    CANDIDATE.undo(subject, applied)
    assert [(name, type(each), sorted(vars(each))) for name, each in model.named_modules()] == before
    again = gradients(model, run)
    assert all(torch.equal(each, again[name]) for name, each in layers.items())


@pytest.mark.parametrize("wrong", ["gated_quantize", "gated_backward_quantize", "quantize_many"])
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_scale_off_by_two_is_rejected(monkeypatch: pytest.MonkeyPatch, wrong: str, factor: float) -> None:
    model = llama()
    run = passes(model)
    subject = in_float8(model, run)
    applied = CANDIDATE.apply(subject, only(CANDIDATE.applies(subject)).setting)
    right = getattr(float8_gated, wrong)

    def off(*args: Any, **options: Any) -> Any:
        rows, columns, scale = right(*args, **options)
        return rows, columns, scale * factor

    monkeypatch.setattr(float8_gated, wrong, off)
    verdict = CANDIDATE.check(subject, run)
    CANDIDATE.undo(subject, applied)
    assert not verdict
    assert "dB, and" in verdict.reason


class Mlp(nn.Module):
    def __init__(self, bias: bool = False, dropout: float = 0.0, width: int = 64, inner: int = 128) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias)
        self.down, self.dropout = nn.Linear(inner, width, bias), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = nn.functional.silu(self.gate(x)) * self.up(x)
        return self.down(self.dropout(middle))  # type: ignore[no-any-return]


def alone(mlp: nn.Module, **options: Any) -> Any:
    model = nn.Sequential(mlp)
    x = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0))

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()  # type: ignore[no-any-return]

    return in_float8(model, run, **options)


@pytest.mark.parametrize(
    ("mlp", "options", "reason"),
    [
        (Mlp(bias=True), {}, "a bias, which the kernels do not add"),
        (Mlp(dropout=0.5), {}, "differ"),
        (Mlp(inner=72), {}, "no multiple of 16"),
        (Mlp(), {"recipe": "rowwise"}, "one scale for a tensor"),
    ],
)
def test_an_mlp_that_the_kernels_do_not_compute_stays_as_it_is(mlp: nn.Module, options: Any, reason: str) -> None:
    found = only(CANDIDATE.applies(alone(mlp.train(), **options)))
    assert isinstance(found, Rejected)
    if reason != "differ":
        assert reason in found.reason


def test_one_half_frozen_stays_as_it_is() -> None:
    mlp = Mlp()
    mlp.gate.weight.requires_grad_(False)
    assert "one of gate and up is frozen" in only(CANDIDATE.applies(alone(mlp))).reason


def test_a_model_without_fp8_is_told_so_and_a_plan_for_one_is_refused() -> None:
    model = llama()
    run = passes(model)
    subject = in_float8(model, run)
    setting = only(CANDIDATE.applies(subject)).setting
    for each in model.modules():
        if isinstance(each, Float8Linear):
            del each.float8
            each.__class__ = nn.Linear
    assert "no module has three layers in FP8" in only(CANDIDATE.applies(subject)).reason
    with pytest.raises(ConfigError, match="not in FP8"):
        CANDIDATE.apply(subject, setting)
