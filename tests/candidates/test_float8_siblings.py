"""FP8 layers of one input become one product, small ones beside them too, with the numbers of FP8."""

from typing import Any

import pytest
import torch

from kpt_lightning.candidates.candidate import Candidate, Change, SelfChecking
from kpt_lightning.candidates.float8_mlp import CANDIDATE as MLP
from kpt_lightning.candidates.float8_siblings import CANDIDATE
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.precision import float8_parallel
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.validation.calls import record_calls
from kpt_lightning.validation.numerics import sqnr_db
from tests.candidates.float8_llama import gradients, in_float8, llama, passes

pytestmark = pytest.mark.usefixtures("every_size")


def only(found: Any) -> Any:
    (one,) = found
    return one


def test_it_is_a_candidate_that_checks_itself() -> None:
    assert isinstance(CANDIDATE, Candidate)
    assert isinstance(CANDIDATE, SelfChecking)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_groups_run_as_one_product_and_undo_leaves_no_trace(small: bool, bias: bool) -> None:
    model = llama(attention_bias=bias)
    run = passes(model)
    exact = gradients(model, run)
    # Without the small ones, keys and values are in bf16 until now.
    subject = in_float8(model, run, small=small)
    layers = gradients(model, run)
    before = [(name, type(each), sorted(vars(each))) for name, each in model.named_modules()]
    change = only(CANDIDATE.applies(subject))
    assert isinstance(change, Change)
    names = [[name.split(".", 4)[-1] for name in group] for group in change.setting["groups"]]
    assert names[0] == ["q_proj", "k_proj", "v_proj"]
    assert ["o_proj"] in names
    assert "14 layers" in change.reason
    applied = CANDIDATE.apply(subject, change.setting)
    with count_gemms() as counts:
        fused = gradients(model, run)
    # Per block and direction: q, k, v; o; gate and up; down.
    assert (counts.launched, counts.total) == (2 * 3 * 4, 2 * 3 * 7)
    for name, each in exact.items():
        assert sqnr_db(each, fused[name]) > min(20.0, sqnr_db(each, layers[name])) - 6
    verdict = CANDIDATE.check(subject, run)
    assert verdict, verdict.reason
    CANDIDATE.undo(subject, applied)
    assert [(name, type(each), sorted(vars(each))) for name, each in model.named_modules()] == before
    again = gradients(model, run)
    assert all(torch.equal(each, again[name]) for name, each in layers.items())


def test_what_an_mlp_took_is_left_to_it() -> None:
    model = llama()
    run = passes(model)
    subject = in_float8(model, run)
    MLP.apply(subject, only(MLP.applies(subject)).setting)
    subject.calls = record_calls(model, run)
    change = only(CANDIDATE.applies(subject))
    assert not any("mlp" in name for group in change.setting["groups"] for name in group)
    CANDIDATE.apply(subject, change.setting)
    with count_gemms() as counts:
        gradients(model, run)
    assert (counts.launched, counts.total) == (2 * 3 * 4, 2 * 3 * 7)
    assert CANDIDATE.check(subject, run)
    assert MLP.check(subject, run)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_scale_off_by_two_is_rejected(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    model = llama()
    run = passes(model)
    subject = in_float8(model, run)
    CANDIDATE.apply(subject, only(CANDIDATE.applies(subject)).setting)
    right = float8_parallel.quantize_many

    def off(*args: Any, **options: Any) -> Any:
        rows, columns, scale = right(*args, **options)
        return rows, columns, scale * factor

    monkeypatch.setattr(float8_parallel, "quantize_many", off)
    assert not CANDIDATE.check(subject, run)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_other_recipes_and_models_without_fp8_are_told_so(recipe: str) -> None:
    model = llama()
    run = passes(model)
    found = only(CANDIDATE.applies(in_float8(model, run, recipe=recipe)))
    assert isinstance(found, Rejected)
    assert "no layer in tensorwise FP8" in found.reason


def test_a_layer_with_a_hook_stays_alone_and_a_plan_that_names_it_is_refused() -> None:
    model = llama()
    run = passes(model)
    subject = in_float8(model, run)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(lambda module, args, output: output)
    groups = only(CANDIDATE.applies(subject)).setting["groups"]
    assert not any("model.layers.0.self_attn.q_proj" in group for group in groups)
    with pytest.raises(ConfigError, match="has hooks"):
        CANDIDATE.apply(subject, {"groups": [["model.layers.0.self_attn.q_proj"]]})
