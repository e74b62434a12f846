"""validate_config on stored machines: what takes effect, what does not, and why."""

from pathlib import Path
from typing import Any

import pytest

from kpt_lightning.config import KptConfig, json_schema
from kpt_lightning.hardware import HardwareProfile
from kpt_lightning.validation.settings import validate_config

PROFILES = Path(__file__).parents[1] / "hardware" / "profiles"


def machine(name: str) -> HardwareProfile:
    return HardwareProfile.load(PROFILES / f"{name}.json")


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.json")))
def test_defaults_fit_every_machine_and_only_what_is_given_is_judged(name: str) -> None:
    assert len(validate_config(KptConfig(), machine(name))) == 0
    assert validate_config(KptConfig.build(level="conservative", precision="32"), machine(name)).ok


CASES: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("h100", {"precision": "fp8", "float8": {"recipe": "rowwise"}, "verify": "kernels"}, {}),
    ("l4", {"precision": "fp8"}, {}),
    ("l4", {"precision": "fp8", "float8": {"recipe": "rowwise"}}, {"precision": "rowwise", "float8.recipe": "rowwise"}),
    ("a100", {"precision": "fp8"}, {"precision": "has no FP8 unit"}),
    ("a100", {"precision": "fp8", "float8": {"emulate": True}}, {}),
    ("a100", {"float8": {"odd_dims": "pad"}}, {"float8.odd_dims": "is ignored, for precision='auto' takes no FP8"}),
    ("mixed_a100_h100", {"precision": "fp8"}, {"precision": "A100"}),
    ("cpu_only", {"verify": "kernels"}, {"verify": "profiles a CUDA step"}),
    ("cpu_only", {"verify": "calls", "precision": "bf16-mixed"}, {}),
    ("cpu_only", {"parallel": "xla"}, {"parallel": "'xla' is for TPUs"}),
    ("h100", {"parallel": "ddp", "level": "aggressive"}, {}),
    ("h100", {"compile": {"blocks": False, "loss": "auto"}}, {}),
]


@pytest.mark.parametrize(("name", "given", "faults"), CASES, ids=[f"{name} {given}" for name, given, _ in CASES])
def test_what_cannot_take_effect_is_named_with_its_reason(
    name: str, given: dict[str, Any], faults: dict[str, str]
) -> None:
    found = validate_config(KptConfig.build(given), machine(name))
    assert {each.subject for each in found.faults} == faults.keys()
    for subject, text in faults.items():
        assert text in found[subject].reason


def test_compilation_that_was_asked_for_needs_a_compiler() -> None:
    data = machine("cpu_only").to_dict()
    config = KptConfig.build({"compile": {"blocks": True}})
    with_compiler = HardwareProfile.from_dict(data | {"versions": data["versions"] | {"cxx": "g++"}})
    without = HardwareProfile.from_dict(data | {"versions": {}})
    assert validate_config(config, with_compiler).ok
    assert "install g++" in validate_config(config, without)["compile.blocks"].reason


def test_every_setting_that_there_is_can_be_judged() -> None:
    everything = KptConfig.build(KptConfig.model_validate(KptConfig().model_dump()))
    judged = {each.subject for each in validate_config(everything, machine("h100"))}
    schema = json_schema()
    sections = {name: schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {}).get("properties")
                for name, field in schema["properties"].items()}  # fmt: skip
    expected = {f"{name}.{key}" for name, inner in sections.items() if inner for key in inner}
    assert judged == expected | {name for name, inner in sections.items() if not inner}


def test_a_slow_precision_takes_effect_and_is_told() -> None:
    found = validate_config(KptConfig.build(precision="bf16-mixed"), machine("v100"))
    assert found.ok
    assert "slow here: " in found["precision"].reason
