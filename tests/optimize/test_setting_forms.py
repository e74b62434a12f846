"""A plan written by hand is told what its settings lack, before a model is touched."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import kpt_lightning.candidates as package
from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Change
from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.optimize.engine import Engine
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.setting_forms import FORMS, check_setting


def test_the_table_has_each_entry_that_a_candidate_reads() -> None:
    for each in registry.candidates():
        source = (Path(package.__path__[0]) / f"{each.name}.py").read_text(encoding="utf-8")
        body = source.partition("def apply(")[2].partition("def undo(")[0]
        read = set(re.findall(r'setting\["(\w+)"\]', body))
        assert read <= set(FORMS.get(each.name, {})), each.name
    assert set(FORMS) <= {each.name for each in registry.candidates()}


@pytest.mark.parametrize("candidate", FORMS)
def test_an_empty_setting_is_told_with_what_it_lacks(candidate: str) -> None:
    with pytest.raises(ConfigError, match=f"plan.{candidate}.*lacks {next(iter(FORMS[candidate]))!r}. Make a new plan"):
        check_setting(Change(candidate=candidate))


@pytest.mark.parametrize(
    ("candidate", "setting", "says"),
    [
        ("compile_blocks", {"blocks": "0"}, "blocks.*valid list"),
        ("compile_blocks", {"blocks": [3]}, "blocks.*0: .*valid string"),
        ("data_loading", {"num_workers": "many"}, "num_workers.*valid integer"),
        ("merged_linear", {"groups": ["a"]}, "groups.*valid list"),
        ("fused_norm", {"backend": "torch", "groups": [{"modules": ["a"]}]}, "groups.*rule: Field required"),
        ("fused_mlp", {"groups": [{"rule": {}, "modules": ["a"]}]}, "groups.*Field required"),
        ("sdpa_attention", ["a"], "is no setting"),
    ],
)
def test_an_entry_of_another_kind_is_told(candidate: str, setting: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_setting(Change(candidate=candidate, setting=setting))


def test_a_plan_without_its_blocks_is_refused_and_the_model_is_as_before() -> None:
    model = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)])
    before = [(type(each), sorted(vars(each))) for each in model.modules()]
    plan = Plan(
        config=KptConfig(),
        device="cpu",
        precision="32",
        parallel="single",
        changes=[Change(candidate="compile_blocks")],
    )
    with pytest.raises(ConfigError, match="lacks 'blocks'"):
        Engine(KptConfig()).start(model, "cpu", plan=plan)
    assert [(type(each), sorted(vars(each))) for each in model.modules()] == before
