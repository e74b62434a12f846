from pathlib import Path

import pytest
import yaml

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.config import FineTuneConfig, merged
from kpt_lightning.recipes.registry import RECIPES, default_config


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_a_full_config_that_its_yaml_gives_again(name: str) -> None:
    config = default_config(name)
    assert config.recipe == name
    data = yaml.safe_load(config.to_yaml())
    # Written where it was not set, it would count as asked for.
    data["data"] = {key: value for key, value in data["data"].items() if key in config.data.model_fields_set}
    again = FineTuneConfig.build(data)
    assert again == config


def test_a_change_replaces_only_what_it_names() -> None:
    config = default_config("causal-lm-lora", steps=7, lora={"rank": 3}, data={"sequence_length": 9}, output="out")
    before = default_config("causal-lm-lora")
    assert (config.steps, config.lora.rank, config.lora.alpha) == (7, 3, before.lora.alpha)
    assert (config.data.sequence_length, config.data.source) == (9, before.data.source)
    assert config.output == Path("out")
    assert config.changed(lora={"alpha": 5}).lora.rank == 3


def test_neither_mapping_is_changed_by_merging() -> None:
    one, two = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merged(one, two) == {"a": {"b": 1, "c": 2}}
    assert (one, two) == ({"a": {"b": 1}}, {"a": {"c": 2}})


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("causal-lm-full", {"stepps": 3}, "stepps=3: is not a setting. Known here: recipe, model, data, steps"),
        ("causal-lm-lora", {"lora": {"r": 3}}, "lora.r=3: is not a setting. Known here: rank, alpha"),
        ("causal-lm-full", {"steps": 0}, "steps=0: input should be greater than or equal to 1"),
        ("causal-lm-full", {"learning_rate": float("nan")}, "learning_rate=nan: "),
        ("causal-lm-full", {"warmup_steps": 40}, "warmup_steps=40: must be below steps=32"),
        ("causal-lm-full", {"lora": {"rank": 4}}, "would be ignored: 'causal-lm-full' trains every weight"),
        ("causal-lm-lora", {"base": "fp8"}, "base='fp8': would be ignored: 'causal-lm-lora' quantizes no weight"),
        ("masked-lm", {"merge": True, "output": "x"}, "merge=True: 'masked-lm' has no adapters"),
        ("causal-lm-lora", {"merge": True}, "merge=True: nothing is written without output"),
        ("causal-lm-lora", {"lora": {"target_modules": []}}, "no layer would get an adapter"),
        ("causal-lm-qlora", {"base": "int3"}, "base='int3': is not allowed. Allowed: 'fp8' or 'int4'"),
        ("causal-lm", {}, "recipe='causal-lm': is no recipe. Known: causal-lm-full, "),
    ],
    ids=str,
)
def test_what_cannot_take_effect_names_field_value_and_rule(recipe: str, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        default_config(recipe, **changes)
    assert said in str(caught.value)


@pytest.mark.parametrize(("steps", "given", "warmup"), [(32, None, 3), (5, None, 0), (32, 0, 0), (32, 9, 9)])
def test_warm_up_is_a_tenth_unless_given(steps: int, given: int | None, warmup: int) -> None:
    assert default_config("causal-lm-full", steps=steps, warmup_steps=given).warmup == warmup
