"""What a model computes with, beside its weights: a plan holds epsilons and activations that were found in it."""

import functools
from typing import Any

import torch
from torch import nn

_LONGEST = 64


def model_facts(model: nn.Module) -> list[tuple[str, str, dict[str, str]]]:
    """Name, class and plain settings of each module, equal in each process for equal models.

    Settings are numbers, short words, dtypes and functions among its public attributes, and those of its ``config``.
    Free text such as paths and dates is left out, for it differs between runs.
    """
    seen: set[int] = set()
    found = []
    for name, module in model.named_modules():
        facts = _plain({key: value for key, value in vars(module).items() if not key.startswith("_")})
        config = vars(module).get("config")
        # transformers gives every layer the same one.
        if hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            facts |= {f"config.{key}": text for key, text in _plain(vars(config)).items()}
        found.append((name, type(module).__qualname__, facts))
    return found


def _plain(values: dict[str, Any]) -> dict[str, str]:
    return {key: text for key, value in values.items() if (text := _text(value)) is not None}


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, bool | int | float | complex | torch.dtype):
        return str(value)
    if isinstance(value, str):
        return value if len(value) <= _LONGEST and value.replace("-", "_").isidentifier() else None
    if isinstance(value, tuple):
        parts = [_text(part) for part in value]
        return None if None in parts else str(parts)
    if isinstance(value, functools.partial):
        return f"{_text(value.func)} {_plain(dict(value.keywords))} {_text(value.args)}"
    name = None if isinstance(value, type) else getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else None
