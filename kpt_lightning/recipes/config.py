"""FineTuneConfig: every setting of one fine-tuning run, strict, as data."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kpt_lightning.config import contradiction, explain
from kpt_lightning.recipes.data_config import DataConfig

RecipeName = Literal[
    "causal-lm-full",
    "causal-lm-lora",
    "causal-lm-qlora",
    "sequence-classification",
    "masked-lm",
    "image-classification",
]
Method = Literal["full", "lora", "qlora"]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class LoraSettings(_Section):
    """Low-rank adapters: https://arxiv.org/abs/2106.09685."""

    rank: int = Field(default=8, ge=1)
    """Rank of the two matrices of an adapter."""
    alpha: int = Field(default=16, ge=1)
    """Scale of the adapters, applied as ``alpha / rank``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is zeroed in training."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False)] = "all-linear"
    """Last parts of the names of the linear layers that get an adapter; all-linear leaves out the output head."""

    @model_validator(mode="after")
    def _some_target(self) -> Self:
        if not self.target_modules:
            contradiction("target_modules", "no layer would get an adapter", "Name one, or write 'all-linear'")
        return self


class FineTuneConfig(_Section):
    """Every setting of one fine-tuning run. A recipe returns one that is complete."""

    recipe: RecipeName
    """Which task is trained, and how."""
    model: str = Field(min_length=1)
    """A name that the recipe knows, a Hugging Face folder, or the name of a model on the hub."""
    data: DataConfig
    """What is read."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(ge=1)
    """Rows of the training data in one forward pass of one process."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Forward passes in one optimizer step."""
    learning_rate: float = Field(gt=0)
    """Peak rate of AdamW."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps in which the rate rises linearly, then it falls linearly to a tenth. None takes a tenth of the steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW, for weights of two or more dimensions."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Norm that the gradients of a step are clipped to."""
    held_out_batches: int = Field(default=8, ge=1)
    """Batches of held-out rows that are measured before and after training, or as many as there are."""
    seed: int = Field(default=0, ge=0)
    """Of new weights and of the order of the rows."""
    lora: LoraSettings = LoraSettings()
    """Adapters, for the recipes that have them."""
    base: Literal["fp8", "int4"] = "fp8"
    """How causal-lm-qlora keeps the frozen weights."""
    output: Annotated[Path, Field(strict=False)] | None = None
    """Folder that the model is written to; None writes nothing."""
    merge: bool = False
    """Write the model with its adapters added to the weights, instead of the adapters alone."""

    @property
    def method(self) -> Method:
        """What is trained: every weight, or adapters on frozen weights, which qlora quantizes."""
        if self.recipe == "causal-lm-lora":
            return "lora"
        return "qlora" if self.recipe == "causal-lm-qlora" else "full"

    @property
    def warmup(self) -> int:
        """Steps in which the rate rises."""
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps

    def to_yaml(self) -> str:
        """Every setting that takes effect, as YAML text."""
        without = {"full": {"lora", "base", "merge"}, "lora": {"base"}, "qlora": set[str]()}[self.method]
        return yaml.safe_dump(self.model_dump(mode="json", exclude=without), sort_keys=False)

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.warmup >= self.steps:
            contradiction("warmup_steps", f"must be below steps={self.steps}", "Lower it or train longer")
        if self.method == "full" and "lora" in self.model_fields_set:
            rule = f"would be ignored: {self.recipe!r} trains every weight"
            contradiction("lora", rule, "Remove it, or take 'causal-lm-lora'")
        if self.merge and self.method == "full":
            contradiction("merge", f"{self.recipe!r} has no adapters", "Remove it")
        if self.merge and self.output is None:
            contradiction("merge", "nothing is written without output", "Set output, or remove merge")
        if self.method != "qlora" and "base" in self.model_fields_set:
            rule = f"would be ignored: {self.recipe!r} quantizes no weight"
            contradiction("base", rule, "Remove it, or take 'causal-lm-qlora'")
        return self

    @classmethod
    def build(cls, data: dict[str, Any]) -> "FineTuneConfig":
        """A config from plain data.

        Raises:
            ConfigError: Unknown key, wrong type or contradictory pair.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise explain(error, cls) from error

    def changed(self, **changes: Any) -> "FineTuneConfig":
        """A copy with some settings replaced; a mapping replaces only what it names in its section.

        Raises:
            ConfigError: As :meth:`build`.
        """
        return self.build(merged(self.model_dump(exclude_unset=True), changes))


def merged(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``data`` with ``changes`` put in, mapping by mapping. Neither is changed."""
    result = dict(data)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result
