"""Which FP8 changes are proposed per recipe and group of layers, and every reason why not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.candidates.candidate import Candidate, Change, SelfChecking
from kpt_lightning.candidates.float8 import CANDIDATE, with_head
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import HEAD_PATTERNS, KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import HardwareProfile, detect
from kpt_lightning.optional import TORCHAO
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.validation.calls import record_calls

PROFILES = Path(__file__).parents[1] / "hardware" / "profiles"
EMULATED = {"precision": "fp8", "float8": {"emulate": True, "only_where_it_pays": False}}


class Model(nn.Module):
    """Layers of two sizes, a small one and a head."""

    def __init__(self, narrow: int = 64, wide: int = 256) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(narrow, wide), nn.Linear(wide, narrow)
        self.q, self.odd, self.lm_head = nn.Linear(narrow, narrow), nn.Linear(narrow, 7), nn.Linear(narrow, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.down(self.up(self.q(x))))
        return out + self.odd(x).sum()


def subject(model: nn.Module, config: Any = None, machine: str | None = None, **known: Any) -> Subject:
    profile = detect() if machine is None else HardwareProfile.load(PROFILES / f"{machine}.json")
    device = torch.device("cpu" if machine is None else "cuda")
    given = {"compute_dtype": torch.bfloat16, "applied": ["compile_blocks"]} | known
    return Subject(model=model, profile=profile, config=KptConfig.build(config), device=device, **given)


def proposals(found: Any) -> list[tuple[str, list[str]]]:
    return [(each.setting["recipe"], each.setting["layers"]) for each in found if isinstance(each, Change)]


def reasons(found: Any) -> list[str]:
    return [each.reason for each in found if isinstance(each, Rejected)]


@pytest.mark.skipif(not TORCHAO.available(), reason=TORCHAO.available().reason)
def test_another_librarys_layers_are_proposed_beside_ours_where_they_would_be_timed() -> None:
    config = {"precision": "fp8", "float8": {"only_where_it_pays": False}}
    found = [each for each in CANDIDATE.applies(subject(Model(), config, "h200")) if isinstance(each, Change)]
    others = [each for each in found if each.setting.get("backend") == "torchao"]
    assert [(each.setting["recipe"], each.setting["layers"]) for each in others] == [
        ("tensorwise", ["up", "down", "q"])
    ]
    assert others[0].reason == "3 linear layers, recipe tensorwise, by torchao"
    asked = {**config, "float8": {**config["float8"], "backend": "native"}}  # type: ignore[dict-item]
    assert all("backend" not in each.setting for each in CANDIDATE.applies(subject(Model(), asked, "h200")))


def test_it_is_a_candidate_that_checks_itself() -> None:
    assert isinstance(CANDIDATE, Candidate)
    assert isinstance(CANDIDATE, SelfChecking)


def test_each_recipe_is_proposed_for_all_layers_and_for_the_largest_alone() -> None:
    every, largest = ["up", "down", "q"], ["up", "down"]
    found = CANDIDATE.applies(subject(Model(), EMULATED))
    assert proposals(found) == [
        ("tensorwise", every),
        ("tensorwise", largest),
        ("rowwise_with_gw_hp", every),
        ("rowwise_with_gw_hp", largest),
    ]
    assert reasons(found) == []
    assert found[0].reason == "3 linear layers, recipe tensorwise"
    assert found[1].reason == "the 2 largest linear layers, recipe tensorwise"


def test_layers_of_one_size_are_one_group() -> None:
    found = CANDIDATE.applies(subject(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), EMULATED))
    assert proposals(found) == [("tensorwise", ["0", "1"]), ("rowwise_with_gw_hp", ["0", "1"])]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_a_recipe_that_the_user_names_is_the_only_one(recipe: str) -> None:
    config = {"precision": "fp8", "float8": {"emulate": True, "only_where_it_pays": False, "recipe": recipe}}
    assert {name for name, _ in proposals(CANDIDATE.applies(subject(Model(), config)))} == {recipe}


@pytest.mark.parametrize(
    ("level", "section", "converted"),
    [
        ("balanced", {}, False),
        ("aggressive", {}, True),
        ("aggressive", {"exclude": ["*lm_head"]}, False),
        ("balanced", {"exclude": []}, True),
    ],
)
def test_the_head_is_proposed_at_the_aggressive_level_or_where_the_user_says_so(
    level: str, section: dict[str, Any], converted: bool
) -> None:
    config = {"level": level, "precision": "fp8", "float8": EMULATED["float8"] | section}  # type: ignore[operator]
    found = proposals(CANDIDATE.applies(subject(Model(), config)))
    assert ("lm_head" in found[0][1]) is converted


def test_the_level_changes_the_exclusions_of_the_head_alone() -> None:
    plain = KptConfig.build({"level": "aggressive", "float8": {"include": ["a*"]}})
    assert with_head(plain).exclude == ()
    assert with_head(plain).include == ("a*",)
    assert with_head(KptConfig()).exclude == HEAD_PATTERNS


@pytest.mark.parametrize(
    ("config", "known", "reason"),
    [
        ({"precision": "bf16-mixed"}, {}, "precision='bf16-mixed' was asked for"),
        ({"precision": "32"}, {}, "precision='32' was asked for"),
        ({}, {"compute_dtype": torch.float32}, "the model runs in torch.float32; FP8 goes with bf16"),
        ({}, {"applied": []}, "without compiled blocks the casts cost more than FP8 wins; precision='fp8' insists"),
        ({}, {"applied": ["fused_norm"]}, "without compiled blocks"),
    ],
)
def test_it_is_declined_with_what_to_do(config: dict[str, Any], known: dict[str, Any], reason: str) -> None:
    (verdict,) = CANDIDATE.applies(subject(Model(1024, 8192), config, "h100", **known))
    assert isinstance(verdict, Rejected)
    assert verdict.reason.startswith(reason)


@pytest.mark.parametrize("compiled", ["compile_blocks", "compile_model"])
def test_compiled_code_of_either_kind_lets_it_be_tried(compiled: str) -> None:
    # Of no memory: sizes as of a real model.
    with torch.device("meta"):
        model = Model(4096, 16384)
    found = CANDIDATE.applies(subject(model, None, "h100", applied=[compiled]))
    assert proposals(found)
    assert not reasons(found)


def test_asked_for_by_name_it_needs_no_compiled_blocks() -> None:
    assert proposals(CANDIDATE.applies(subject(Model(), EMULATED, applied=[])))


@pytest.mark.parametrize(("machine", "kept"), [("a100", []), ("l4", ["tensorwise"]), ("h100", None)])
def test_a_machine_without_the_units_is_told_for_each_recipe(machine: str, kept: list[str] | None) -> None:
    with torch.device("meta"):
        model = Model(4096, 16384)
    found = CANDIDATE.applies(subject(model, None, machine))
    recipes = list(dict.fromkeys(name for name, _ in proposals(found)))
    assert recipes == (["tensorwise", "rowwise_with_gw_hp"] if kept is None else kept)
    assert len(reasons(found)) == 2 - len(recipes)


def test_a_model_without_fitting_layers_is_told_why() -> None:
    found = CANDIDATE.applies(subject(Model(), {"precision": "fp8", "float8": {"emulate": True}}))
    assert proposals(found) == []
    assert all(reason.startswith("none of 5 linear layers can or should: ") for reason in reasons(found))
    (none, _) = CANDIDATE.applies(subject(nn.Sequential(nn.ReLU()), EMULATED))
    assert none.reason == "none of 0 linear layers can or should: there is none"


def test_the_prediction_is_amdahls_over_the_products_of_the_layers() -> None:
    model = Model(1024, 8192)
    x = torch.randn(2, 1024)
    calls = record_calls(model, lambda: model(x))
    config = {"float8": {"only_where_it_pays": False}}
    found = [
        each
        for each in CANDIDATE.applies(subject(model, config, "h100", step_seconds=1e-3, calls=calls))
        if isinstance(each, Change)
    ]
    every, largest = found[0].predicted, found[1].predicted
    assert every is not None
    assert largest is not None
    flops = 6 * 2 * (2 * 1024 * 8192 + 1024 * 1024)
    saved = flops / (989.4e12 * 0.7) * (1 - 1 / 1.85)
    assert every == pytest.approx(1e-3 / (1e-3 - saved), rel=1e-3)
    assert 1.0 < largest < every


@pytest.mark.parametrize("known", [{}, {"step_seconds": 0.0}])
def test_nothing_is_predicted_without_a_measured_step(known: dict[str, Any]) -> None:
    config = {"float8": {"only_where_it_pays": False}}
    assert all(each.predicted is None for each in CANDIDATE.applies(subject(Model(), config, "h100", **known)))


def test_layers_run_in_fp8_while_it_is_applied_and_are_themselves_afterwards() -> None:
    model, known = Model(), subject(Model(), EMULATED)
    known.model = model
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    setting = {"recipe": "rowwise", "layers": ["up", "q"]}
    state = CANDIDATE.apply(known, setting)
    assert [name for name, module in model.named_modules() if isinstance(module, Float8Linear)] == ["up", "q"]
    assert model.up.float8.recipe.name == "rowwise"  # type: ignore[union-attr]
    CANDIDATE.undo(known, state)
    assert {name: (type(module), dict(vars(module))) for name, module in model.named_modules()} == before


def test_a_setting_of_another_model_changes_nothing() -> None:
    known = subject(Model(), EMULATED)
    with pytest.raises(ConfigError, match=r"'gone': is no module in this model"):
        CANDIDATE.apply(known, {"recipe": "tensorwise", "layers": ["up", "gone"]})
    with pytest.raises(ConfigError, match=r"float8.recipe='mxfp8'"):
        CANDIDATE.apply(known, {"recipe": "mxfp8", "layers": ["up"]})
    assert not any(isinstance(module, Float8Linear) for module in known.model.modules())


def test_its_own_check_looks_at_the_layers() -> None:
    model = Model()
    known = subject(model, EMULATED)
    state = CANDIDATE.apply(known, {"recipe": "tensorwise", "layers": ["up", "down"]})
    x = torch.randn(64, 64)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()  # type: ignore[no-any-return]

    assert CANDIDATE.check(known, run)
    CANDIDATE.undo(known, state)
    assert not CANDIDATE.check(known, run)
