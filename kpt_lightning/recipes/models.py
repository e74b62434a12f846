"""Causal language models by name: the one that a package carries, a folder, or one of the hub."""

from typing import TYPE_CHECKING

from torch import nn

from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import TRANSFORMERS
from kpt_lightning.recipes import smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model.

    Args:
        name: ``smollm2-135m``, a Hugging Face folder or a name of the hub.

    Raises:
        ConfigError: There is none of that name.
        MissingDependencyError: Where transformers, or the package that carries the model, is absent.
    """
    if name == SMOLLM2:
        return smollm2.load_tokenizer()
    TRANSFORMERS.require(f"model={name!r}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _absent(name, error) from error


def load_causal_lm(name: str) -> nn.Module:
    """The model in float32 on the CPU, without a key-value cache. Names and errors as :func:`load_tokenizer`."""
    if name == SMOLLM2:
        pretrained: nn.Module = smollm2.load_model()
        return pretrained
    TRANSFORMERS.require(f"model={name!r}")
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _absent(name, error) from error
    model.config.use_cache = False  # type: ignore[union-attr]
    return model


def _absent(name: str, error: Exception) -> ConfigError:
    said = str(error).strip().splitlines()
    rule = f"transformers cannot load it: {said[0].rstrip('.') if said else type(error).__name__}"
    return ConfigError("model", name, rule, f"Known here: {SMOLLM2}; else give a Hugging Face folder or a hub name")
