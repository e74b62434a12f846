"""Settings of the data that a recipe does not read: one that was given is refused, not ignored."""

from collections.abc import Iterable

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.data_config import DataConfig


def refuse_unused(recipe: str, data: DataConfig, used: Iterable[str]) -> None:
    """Refuse what was set and has no effect.

    Args:
        recipe: Its name.
        data: Of its config.
        used: Names of the settings that the recipe reads.

    Raises:
        ConfigError: Naming the first such setting.
    """
    known = set(used)
    for name in sorted(data.model_fields_set - known):
        value = getattr(data, name)
        if value != type(data).model_fields[name].default:
            rule = f"would be ignored: {recipe!r} does not read it"
            raise ConfigError(f"data.{name}", value, rule, f"Remove it; read here: {', '.join(sorted(known))}")
