"""A plan made before is taken up for another run, or refused with what does not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Accepted
from kpt_lightning.errors import ConfigError, UnsupportedHardwareError
from kpt_lightning.hardware import HardwareProfile, detect
from kpt_lightning.optimize.apply import applied
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.replay import adopted, load_plan
from kpt_lightning.precision.float8_linear import Float8Linear

PROFILES = Path(__file__).parents[1] / "hardware" / "profiles"
FLOAT8 = Change(candidate="float8", setting={"recipe": "tensorwise", "layers": ["0"]})
BLOCKS = Change(candidate="compile_blocks", setting={"blocks": ["0"]})


def profile(name: str = "h100") -> HardwareProfile:
    return HardwareProfile.load(PROFILES / f"{name}.json")


def plan(*changes: Change, **more: Any) -> Plan:
    given: dict[str, Any] = {"config": KptConfig(), "device": "H100", "precision": "fp8", "parallel": "single"} | more
    return Plan(changes=list(changes), proofs=[Accepted("fp8 calls", "of another run")], **given)


def adopt(made: Plan, machine: str = "h100", parallel: str | None = None, precision: str | None = None) -> Plan:
    decision = None if parallel is None else Accepted(f"parallel {parallel}", "asked for")
    return adopted(made, profile(machine), parallel=decision, given_precision=precision)


def test_a_plan_is_loaded_from_an_object_a_path_and_its_text(tmp_path: Path) -> None:
    made = plan(FLOAT8)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(made.to_dict()), encoding="utf-8")
    assert load_plan(made) is made
    assert load_plan(path) == load_plan(str(path)) == load_plan(made.to_dict()) == made


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"precision": 8}, "plan.precision: 8|plan.precision.*text"),
        ({"changes": [FLOAT8.to_dict(), FLOAT8.to_dict()]}, "float8.*is there twice"),
    ],
)
def test_a_plan_edited_by_hand_into_nonsense_is_refused(edit: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        adopt(load_plan(plan(FLOAT8).to_dict() | edit))


def test_something_else_than_a_plan_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no plan"):
        load_plan(["plan.json"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read: .*No such file"),
        ("{", "cannot be read: "),
        ("", "cannot be read: "),
        ("[1, 2]", "holds no plan. Write one with plan.to_dict"),
        ("3", "holds no plan"),
        ("{}", "does not have the form of this version .*Make a new plan"),
    ],
)
def test_a_file_that_holds_no_plan_is_told(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        load_plan(path)


def test_a_folder_or_bytes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_plan(tmp_path)
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_plan(tmp_path / "plan.json")


def test_a_plan_taken_up_has_this_runs_machine_and_layout_and_no_proof() -> None:
    made = plan(FLOAT8, BLOCKS)
    found = adopt(made, "l4", "ddp")
    assert (found.device, found.parallel, found.proofs) == (profile("l4").primary.name, "ddp", [])
    assert found.changes == made.changes
    # What was made before is not changed.
    assert (made.device, made.parallel, len(made.proofs)) == ("H100", "single", 1)
    assert adopt(made).parallel == "single"


@pytest.mark.parametrize(
    ("planned", "given", "fits"),
    [
        ("fp8", None, True),
        ("fp8", "fp8", True),
        ("fp8", "bf16-mixed", True),
        ("fp8", "32", False),
        ("bf16-mixed", "bf16-mixed", True),
        ("bf16-mixed", "32", False),
        ("bf16-mixed", "fp8", False),
        ("32", "bf16-mixed", False),
        ("32", "32", True),
    ],
)
def test_a_trainers_own_precision_must_fit(planned: str, given: str | None, fits: bool) -> None:
    made = plan(precision=planned)
    if fits:
        assert adopt(made, precision=given).precision == planned
        return
    with pytest.raises(ConfigError, match=f"plan='precision {planned}': contradicts .* {given!r}. Remove one"):
        adopt(made, precision=given)


@pytest.mark.parametrize(("machine", "fits"), [("h100", True), ("l4", True), ("a100", False), ("cpu_only", False)])
def test_fp8_needs_the_units_for_its_recipe(machine: str, fits: bool) -> None:
    if fits:
        assert adopt(plan(FLOAT8), machine).changes == [FLOAT8]
        return
    with pytest.raises(UnsupportedHardwareError, match=r"the plan asks for float8, and .*Make a new plan"):
        adopt(plan(FLOAT8), machine)


def test_the_recipe_of_the_plan_counts_and_not_that_of_the_settings() -> None:
    rowwise = replace(FLOAT8, setting={**FLOAT8.setting, "recipe": "rowwise"})
    assert adopt(plan(rowwise))
    with pytest.raises(UnsupportedHardwareError, match="rowwise"):
        adopt(plan(rowwise), "l4")


def test_emulation_needs_no_units() -> None:
    config = KptConfig.build({"precision": "fp8", "float8": {"emulate": True}})
    assert adopt(plan(FLOAT8, config=config), "cpu_only").changes == [FLOAT8]


def test_a_candidate_that_is_not_known_here_is_told() -> None:
    with pytest.raises(ConfigError, match=r"candidate='of_another_version': is not known here. Make a new plan"):
        adopt(plan(Change(candidate="of_another_version")))


def test_a_plan_from_a_file_changes_the_model_as_it_did_before(tmp_path: Path) -> None:
    config = KptConfig.build({"precision": "fp8", "float8": {"emulate": True}})
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan(FLOAT8, config=config).to_dict()), encoding="utf-8")
    found = load_plan(path)
    model = nn.Sequential(nn.Linear(16, 16))
    known = Subject(model=model, profile=detect(), config=found.config, device=torch.device("cpu"))
    with applied(known, found.changes):
        assert isinstance(model[0], Float8Linear)
        assert model(torch.ones(2, 16)).shape == (2, 16)
    assert type(model[0]) is nn.Linear
