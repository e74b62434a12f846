"""The labels of a data set, in the order of a classifier's outputs."""

from collections.abc import Sequence
from typing import Any

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.record_files import Row
from kpt_lightning.recipes.records import require_columns


def class_names(train: Sequence[Row], held_out: Sequence[Row], data: DataConfig, checkpoint: Any) -> list[str]:
    """Each label of the training rows once: as the checkpoint orders them where it has the same, else sorted.

    Args:
        train: Rows to train on.
        held_out: Rows to measure on.
        data: Names the column.
        checkpoint: Configuration of the pretrained model.

    Raises:
        ConfigError: The column is missing, its values are no labels, or a held-out label is never trained on.
    """
    column = data.label_column
    for rows in (train, held_out):
        require_columns(rows, data.source, [column])
    labels = {_label(row[column], column) for row in train}
    if len(labels) < 2:
        rule = f"every row to train on has the label {next(iter(labels))!r}"
        raise ConfigError("data.label", column, rule, "Name a column with two labels or more")
    names = [str(label) for label in sorted(labels, key=lambda label: (isinstance(label, str), label))]
    if unknown := {str(_label(row[column], column)) for row in held_out}.difference(names):
        rule = f"the held-out label {min(unknown)!r} is in no row to train on"
        raise ConfigError("data.label", column, rule, f"Trained on: {', '.join(names)}; correct the rows or the split")
    own: dict[str, int] = getattr(checkpoint, "label2id", None) or {}
    return sorted(own, key=own.__getitem__) if set(own) == set(names) else names


def numbered(rows: Sequence[Row], column: str, names: Sequence[str]) -> list[int]:
    """The place of each row's label among the names."""
    places = {name: place for place, name in enumerate(names)}
    return [places[str(row[column])] for row in rows]


def _label(value: object, column: str) -> str | int:
    if isinstance(value, str | int):
        return value
    rule = f"holds {type(value).__name__} ({value!r}), and a label is a string or a whole number"
    raise ConfigError("data.label", column, rule, "Name another column, or write labels")
