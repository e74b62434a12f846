"""The configuration: strict, with messages that say what to do, and the same after a trip through a file."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kpt_lightning.config import CompileConfig, Float8Config, KptConfig, Level, json_schema
from kpt_lightning.errors import ConfigError

DOCS = Path(__file__).parents[1] / "docs"
SCHEMA = DOCS / "kpt_config.schema.json"
EXAMPLES: list[dict[str, Any]] = [
    {},
    {"level": "aggressive"},
    {"precision": "fp8", "float8": {"emulate": True, "recipe": "rowwise", "include": ["*.mlp.*"]}},
    {"precision": "32", "compile": {"blocks": True, "loss": False}},
    {"parallel": "fsdp2", "verify": "calls", "float8": {"exclude": [], "odd_dims": "pad"}},
]


@pytest.mark.parametrize("data", EXAMPLES, ids=str)
def test_settings_survive_yaml_pickle_and_building_again(data: dict[str, Any], tmp_path: Path) -> None:
    config = KptConfig.build(data)
    config.to_yaml(tmp_path / "config.yaml")
    for other in (
        KptConfig.from_yaml(tmp_path / "config.yaml"),
        KptConfig.build(tmp_path / "config.yaml"),
        KptConfig.build(str(tmp_path / "config.yaml")),
        KptConfig.build(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert other == config
        assert other.model_fields_set == config.model_fields_set == set(data)
        assert other.float8.model_fields_set == config.float8.model_fields_set


def test_the_defaults_need_no_thought() -> None:
    config = KptConfig.build()
    assert (config.level, config.precision, config.parallel) == (Level.BALANCED, "auto", "auto")
    assert (config.float8, config.compile) == (Float8Config(), CompileConfig())


def test_overrides_replace_fields_and_none_is_no_override() -> None:
    config = KptConfig.build({"level": "aggressive", "precision": "bf16"}, precision="fp8", level=None)
    assert (config.level, config.precision) == (Level.AGGRESSIVE, "fp8")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"compile": {"blocks": "yes"}}, "compile.blocks='yes': is not allowed. Allowed: 'auto', true or false."),
        (
            {"precision": 32},
            "precision=32: is not allowed. Allowed: 'auto', 'fp8', 'fp8-true', 'bf16', 'bf16-mixed' or '32'.",
        ),
        ({"level": "max"}, "level='max': is not allowed. Allowed: 'conservative', 'balanced' or 'aggressive'."),
        ({"float8": {"emulate": 1}}, "float8.emulate=1: is not allowed. Allowed: true or false."),
        ({"float8": {"exclude": "head"}}, "float8.exclude='head': is not allowed. Allowed: a list of strings."),
        ({"float8": {"include": [3]}}, "float8.include=3: is not allowed. Allowed: a string."),
        ({"compile": True}, "compile=True: is not allowed. Allowed: a mapping of settings."),
        (
            {"levle": "balanced"},
            "levle='balanced': is not a setting. "
            "Known here: level, precision, parallel, float8, compile, on_mismatch, verify.",
        ),
        ({"compile": {"block": True}}, "compile.block=True: is not a setting. Known here: blocks, loss."),
    ],
    ids=str,
)
def test_a_fault_names_field_value_rule_and_next_step(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KptConfig.build(data)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("data", "field", "value"),
    [
        ({"precision": "bf16", "float8": {"recipe": "rowwise"}}, "float8.recipe", "rowwise"),
        ({"precision": "32", "float8": {"emulate": True}}, "float8.emulate", True),
        ({"level": "conservative", "precision": "fp8"}, "precision", "fp8"),
        ({"level": "conservative", "float8": {"odd_dims": "pad"}}, "float8.odd_dims", "pad"),
        ({"float8": {"emulate": True}}, "float8.emulate", True),
    ],
    ids=str,
)
def test_two_settings_that_contradict_each_other_raise(data: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        KptConfig.build(data)
    assert (caught.value.field, caught.value.value) == (field, value)
    assert "Set " in str(caught.value)


def test_a_contradiction_is_also_found_between_a_file_and_an_override(tmp_path: Path) -> None:
    KptConfig.build({"float8": {"recipe": "rowwise"}}).to_yaml(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="would be ignored beside precision='bf16-mixed'"):
        KptConfig.build(tmp_path / "config.yaml", precision="bf16-mixed")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("- a\n- b\n", "must hold a mapping"),
        ("level: [", "is no YAML"),
        ("level: balanced\nlevel: aggressive\n", "the key 'level' stands twice"),
        ("float8: {recipe: rowwise, recipe: tensorwise}\n", "the key 'recipe' stands twice"),
        ("precision: 32\n", "'32'"),
        (b"\xff\xfe\x00", "is no YAML"),
    ],
    ids=str,
)
def test_a_broken_file_raises_with_the_reason(text: str | bytes, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=rule):
        KptConfig.from_yaml(path)


def test_yaml_anchors_and_merges_may_be_used(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("float8:\n  <<: {recipe: rowwise, emulate: true}\n  recipe: tensorwise\nprecision: fp8\n")
    assert KptConfig.from_yaml(path).float8 == Float8Config(recipe="tensorwise", emulate=True)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml") as caught:
        KptConfig.build("nowhere.yaml")
    assert "cannot be read (No such file or directory)" in str(caught.value)


@pytest.mark.parametrize("source", [[1], 3, True])
def test_a_source_of_another_kind_raises(source: Any) -> None:
    with pytest.raises(ConfigError, match="is no KptConfig, dict or path"):
        KptConfig.build(source)


def test_settings_cannot_be_changed_afterwards() -> None:
    config = KptConfig()
    for section in (config, config.float8, config.compile):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, next(iter(type(section).model_fields)), "auto")


def test_the_stored_schema_is_the_current_one_and_describes_every_setting() -> None:
    schema = json_schema()
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == schema, (
        "run: kpt config --schema > docs/kpt_config.schema.json"
    )
    assert schema["properties"].keys() == KptConfig.model_fields.keys()
    for section in ("Float8Config", "CompileConfig"):
        assert all("description" in field for field in schema["$defs"][section]["properties"].values())


@pytest.mark.parametrize("data", EXAMPLES, ids=str)
def test_every_setting_of_an_example_is_in_the_schema(data: dict[str, Any]) -> None:
    def check(values: dict[str, Any], section: dict[str, Any]) -> None:
        for name, value in values.items():
            place = section["properties"][name]
            place = json_schema()["$defs"][place["$ref"].rpartition("/")[2]] if "$ref" in place else place
            if isinstance(value, dict):
                check(value, place)
            assert "enum" not in place or value in place["enum"]

    check(data, json_schema())


def fenced(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_table_of_settings_has_every_setting_and_its_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", (DOCS / "config.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = {name: default.strip("`") for name, default in rows}
    known = yaml.safe_load(KptConfig().to_yaml(unset=True))
    flat = {
        f"{name}.{key}" if key else name: value
        for name, section in known.items()
        for key, value in (section.items() if isinstance(section, dict) else [("", section)])
    }
    assert list(told) == list(flat)
    for name, default in told.items():
        assert isinstance(flat[name], list) or yaml.safe_load(default) == flat[name], name


def test_the_yaml_example_is_a_valid_file(tmp_path: Path) -> None:
    (example,) = fenced("config.md", "yaml")
    (tmp_path / "kpt.yaml").write_text(example)
    config = KptConfig.from_yaml(tmp_path / "kpt.yaml")
    assert (config.precision, config.float8.recipe) == ("fp8", "rowwise")


@pytest.mark.parametrize(
    "settings", [{"compile": {"blocks": "yes"}}, {"precision": "bf16", "float8": {"recipe": "rowwise"}}], ids=str
)
def test_the_messages_shown_are_the_messages_raised(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        KptConfig.build(settings)
    assert f"{caught.value}\n" in (DOCS / "config.md").read_text(encoding="utf-8")
