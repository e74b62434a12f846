"""Low-rank adapters on a frozen model, whose weights may be quantized."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import PEFT
from kpt_lightning.recipes.config import LoraSettings
from kpt_lightning.recipes.frozen_linear import Base, FrozenLinear


def add_lora(model: nn.Module, settings: LoraSettings, *, task_type: str = "CAUSAL_LM") -> nn.Module:
    """Freeze the model and add trainable low-rank adapters to its linear layers.

    Args:
        model: A transformers model; it gets the adapters in place.
        settings: Rank, scale and which layers.
        task_type: peft's name of the task.

    Returns:
        peft's model around it.

    Raises:
        ConfigError: No layer has one of the names.
        MissingDependencyError: Where peft is absent.
    """
    PEFT.require("LoRA")
    from peft import LoraConfig, get_peft_model

    targets: Any = settings.target_modules
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=task_type,
    )
    try:
        with without_peft_notes():
            adapted: nn.Module = get_peft_model(model, lora)
    except ValueError as error:
        step = "Name the last parts of the names of linear layers, or write 'all-linear'"
        raise ConfigError("lora.target_modules", targets, str(error).splitlines()[0].rstrip("."), step) from error
    return adapted


@contextmanager
def without_peft_notes() -> Iterator[None]:
    """Without what peft 0.21 warns of while it asks transformers by an old name; neither is the user's doing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def quantize_base(model: nn.Module, base: Base) -> int:
    """Keep the frozen weight below each adapter in fewer bits, in place.

    Args:
        model: What :func:`add_lora` returned.
        base: Format.

    Returns:
        Layers changed.

    Raises:
        ConfigError: A weight does not fit the format.
        MissingDependencyError: torchao is absent or too old.
    """
    from peft.tuners.lora import Linear

    layers = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.base_layer = FrozenLinear(layer.base_layer, base)
    return len(layers)
