"""KptConfig: the one configuration, strict, YAML in and out."""

from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from kpt_lightning.errors import ConfigError


class Level(StrEnum):
    """What may change in the numbers."""

    CONSERVATIVE = "conservative"
    """Same precision as the user's, other kernels only."""
    BALANCED = "balanced"
    """Also FP8 block linears; fp32 master weights stay."""
    AGGRESSIVE = "aggressive"
    """Also the output head in FP8."""

    @property
    def and_below(self) -> tuple["Level", ...]:
        """This level and those that keep more of the numbers: what may be in a plan at this level."""
        levels = tuple(Level)
        return levels[: levels.index(self) + 1]


PrecisionName = Literal["auto", "fp8", "fp8-true", "bf16", "bf16-mixed", "32"]
FP8_PRECISIONS = ("fp8", "fp8-true")
"""Those that ask for FP8 by name."""
BF16_WEIGHTS = ("bf16", "fp8-true")
"""Those that cast the weights."""
WITHOUT_FLOAT8 = {"fp8": "bf16-mixed", "fp8-true": "bf16"}
"""What a model without layers in FP8 runs in."""
ParallelName = Literal["auto", "single", "ddp", "fsdp2", "xla"]
BackendName = Literal["native", "torchao"]
RecipeName = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
Switch = Literal["auto"] | bool

# Output heads: their rounding error goes straight into the loss.
HEAD_PATTERNS = ("*lm_head", "*head", "*classifier", "*score", "*embed_out", "*output_projection")


class _Loader(yaml.SafeLoader):
    """YAML's own loader keeps the last of two equal keys and drops the first in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises ConstructorError where a key stands twice."""
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Float8Config(_Section):
    """How linear layers run in FP8."""

    recipe: RecipeName = "tensorwise"
    """Scaling granularity. tensorwise is the fastest, rowwise_with_gw_hp (bf16 weight gradient) the most accurate."""
    backend: BackendName = "native"
    """Whose code quantizes and multiplies: this package's, or torchao's. A trial tries both where torchao is there."""
    emulate: bool = False
    """Run the same numerics in fp32 arithmetic on any device. For tests: slower than no FP8."""
    include: tuple[str, ...] = Field(default=(), strict=False)
    """fnmatch patterns of module names to convert; empty means every linear layer that the other rules admit."""
    exclude: tuple[str, ...] = Field(default=HEAD_PATTERNS, strict=False)
    """fnmatch patterns of module names to leave alone."""
    odd_dims: Literal["skip", "pad"] = "skip"
    """A layer whose dimensions are no multiple of 16 is skipped with its reason, or zero-padded at run time."""
    only_where_it_pays: bool = True
    """Skip layers too small to win back the cost of quantization."""


class CompileConfig(_Section):
    """What is compiled in place. "auto" compiles on CUDA and leaves a CPU alone."""

    blocks: Switch = "auto"
    """Repeated blocks, one by one, so that masks are built outside and attention stays causal."""
    loss: Switch = "auto"
    """The loss function of a transformers model."""


class KptConfig(_Section):
    """Everything that can be set. Each field has a default that needs no thought."""

    level: Level = Field(default=Level.BALANCED, strict=False)
    """What may change in the numbers."""
    precision: PrecisionName = "auto"
    """fp8 and bf16-mixed keep fp32 master weights; fp8-true and bf16 cast them to bf16; auto picks by hardware and
    level."""
    parallel: ParallelName = "auto"
    """auto is single for one device and ddp for several."""
    float8: Float8Config = Float8Config()
    """How linear layers run in FP8."""
    compile: CompileConfig = CompileConfig()
    """What is compiled in place."""
    on_mismatch: Literal["warn", "raise"] = "warn"
    """When less runs than the plan says: warn, or stop. If nothing of it runs, training stops in any case."""
    verify: Literal["kernels", "calls"] = "kernels"
    """After step 1 the FP8 GEMM calls are checked against the plan; "kernels" also profiles one CUDA step."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        given = self.float8.model_fields_set
        if self.precision in ("bf16", "bf16-mixed", "32") and given:
            contradiction(
                f"float8.{sorted(given)[0]}", f"would be ignored beside precision={self.precision!r}",
                "Set precision to 'fp8' or 'auto', or remove the float8 section",
            )  # fmt: skip
        if self.level is Level.CONSERVATIVE and self.precision in FP8_PRECISIONS:
            contradiction(
                "precision", f"{self.precision!r} is not allowed at level 'conservative', which keeps the numbers",
                "Set level to 'balanced', or another precision",
            )  # fmt: skip
        if self.level is Level.CONSERVATIVE and given:
            contradiction(
                f"float8.{sorted(given)[0]}", "would be ignored at level 'conservative', which keeps the numbers",
                "Set level to 'balanced', or remove the float8 section",
            )  # fmt: skip
        if self.float8.backend != "native" and self.float8.odd_dims == "pad":
            contradiction(
                "float8.odd_dims", f"padding goes with backend 'native'; backend is {self.float8.backend!r}",
                "Set odd_dims to 'skip', or remove backend",
            )  # fmt: skip
        if self.float8.backend != "native" and self.parallel == "fsdp2":
            contradiction(
                "float8.backend", f"{self.float8.backend!r} keeps the Parameters that fsdp2 exchanges",
                "Remove backend, or set parallel to 'ddp'",
            )  # fmt: skip
        if self.float8.emulate and self.precision not in FP8_PRECISIONS:
            contradiction(
                "float8.emulate", f"emulation must be asked for; precision is {self.precision!r}",
                "Set precision to 'fp8'",
            )  # fmt: skip
        return self

    @classmethod
    def build(cls, source: "KptConfig | dict[str, Any] | str | Path | None" = None, **overrides: Any) -> "KptConfig":
        """A config from an object, a dict or a YAML file, with some fields replaced.

        Args:
            source: What to start from; None means the defaults.
            overrides: Fields to replace; None values are left out.

        Raises:
            ConfigError: Unknown key, wrong type or contradictory pair.
        """
        if isinstance(source, str | Path):
            source = cls.from_yaml(source)
        if not isinstance(source, KptConfig | dict | None):
            raise ConfigError("config", source, "is no KptConfig, dict or path", "Pass one of these")
        data = source.model_dump(exclude_unset=True) if isinstance(source, KptConfig) else dict(source or {})
        data.update({key: value for key, value in overrides.items() if value is not None})
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise explain(error, cls) from error

    @classmethod
    def from_yaml(cls, path: str | Path) -> "KptConfig":
        """Read a YAML file.

        Raises:
            ConfigError: The file is missing, is no YAML mapping, or breaks a rule.
        """
        path = Path(path)
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except OSError as error:
            raise ConfigError("config", str(path), f"cannot be read ({error.strerror})", "Check the path") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError("config", str(path), f"is no YAML: {error}", "Correct the file") from error
        if not isinstance(data, dict | None):
            raise ConfigError("config", str(path), "must hold a mapping of settings", "Write 'key: value' lines")
        return cls.build(data)

    def to_yaml(self, path: str | Path | None = None, *, unset: bool = False) -> str:
        """The settings as YAML text.

        Args:
            path: The text is also written there.
            unset: Write the defaults of fields that were not set, too.
        """
        text = yaml.safe_dump(self.model_dump(mode="json", exclude_unset=not unset), sort_keys=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors: https://json-schema.org/draft/2020-12/schema."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **KptConfig.model_json_schema()}


def contradiction(field: str, rule: str, next_step: str) -> None:
    """Raise within a validator what :func:`explain` turns into a ConfigError."""
    raise PydanticCustomError("contradiction", "{rule}", {"field": field, "rule": rule, "next_step": next_step})


def explain(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """The first fault of a pydantic report as one sentence."""
    faults = error.errors()
    fault = faults[0]
    context = fault.get("ctx", {})
    where = _setting(fault["loc"])
    field = ".".join(where) or "config"
    if fault["type"] == "contradiction":
        value = fault["input"]
        for part in context["field"].split("."):
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        return ConfigError(context["field"], value, context["rule"], context["next_step"])
    if fault["type"] == "extra_forbidden":
        section: Any = model
        for part in where[:-1]:
            section = section.model_fields[part].annotation
        return ConfigError(field, fault["input"], "is not a setting", f"Known here: {', '.join(section.model_fields)}")
    # A union reports one fault for each of its members.
    allowed = [text for each in faults if _setting(each["loc"]) == where and (text := _allowed(each))]
    if allowed:
        return ConfigError(field, fault["input"], "is not allowed", f"Allowed: {', '.join(allowed)}")
    return ConfigError(field, fault["input"], fault["msg"][0].lower() + fault["msg"][1:], "Correct it")


# Faults of pydantic that do not name in our words what they let pass.
_ALLOWED = {
    "bool_type": "true or false",
    "model_type": "a mapping of settings",
    "string_type": "a string",
    "tuple_type": "a list of strings",
}


def _setting(location: tuple[int | str, ...]) -> list[str]:
    """The names of a fault's place, without the members of a union and the places in a tuple."""
    return [str(part) for part in location if not isinstance(part, int) and not part.startswith(("literal[", "bool"))]


def _allowed(fault: Any) -> str:
    """What a fault's rule lets pass, empty where it is none of a list."""
    return str(fault.get("ctx", {}).get("expected", _ALLOWED.get(fault["type"], "")))
