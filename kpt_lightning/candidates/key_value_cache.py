"""Switching off the key-value cache of a transformers model while it trains.

The cache is of no use in training, and each layer writes to it under its own number: compiled blocks then need a graph
for each layer instead of one for all.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from kpt_lightning.decision import Accepted, Decision, Rejected


def decide_cache(model: nn.Module) -> Decision:
    """Whether ``model`` holds a transformers configuration that asks for the cache."""
    found = next(_configs(model), None)
    if found is None:
        return Rejected("use_cache off", "no transformers model that keeps a key-value cache in training")
    return Accepted(
        "use_cache off", f"{type(found).__name__}.use_cache=False for this run: one graph serves all layers"
    )


def switch_off_cache(model: nn.Module) -> list[Any]:
    """Switch it off.

    Returns:
        The configurations, for :func:`restore_cache`.
    """
    configs = list(_configs(model))
    for config in configs:
        config.use_cache = False
    return configs


def restore_cache(configs: list[Any]) -> None:
    """Undo :func:`switch_off_cache`."""
    for config in configs:
        config.use_cache = True


def _configs(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        # Told by name, for this layer imports no transformers.
        known = any(kind.__module__.startswith("transformers.") for kind in type(config).__mro__)
        if known and id(config) not in seen and getattr(config, "use_cache", None) is True:
            seen.add(id(config))
            yield config
