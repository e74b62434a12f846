"""The rows of a source, as plain mappings, with their columns checked before anything else is done."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes import movie_reviews, text
from kpt_lightning.recipes.data_config import BUILT_IN, HUB, DataConfig, SampleBy
from kpt_lightning.recipes.record_files import FIELD, READERS, Row, read_folder, read_hub, read_text


def read_rows(source: str, sample_by: SampleBy = "paragraph") -> list[Row]:
    """All rows of a source, in its order.

    Args:
        source: As in :class:`DataConfig`.
        sample_by: What one row of a .txt file is.

    Raises:
        ConfigError: The source cannot be read, is of no known kind, or holds no row.
        MissingDependencyError: The package that carries or reads it is absent.
    """
    if source in BUILT_IN:
        rows = _built_in(source)
    elif source.startswith(HUB):
        rows = read_hub(source)
    else:
        rows = _of_path(Path(source), sample_by)
    if not rows:
        raise ConfigError(FIELD, source, "holds no row", "Name a source that is not empty")
    return rows


def require_columns(rows: Sequence[Row], source: str, columns: Iterable[str]) -> None:
    """Refuse rows that lack a column or have nothing in it.

    Raises:
        ConfigError: Naming the row and the columns that are there.
    """
    for column in columns:
        for number, row in enumerate(rows, 1):
            if row.get(column) is None:
                rule = f"is {'empty' if column in row else 'no column'} in row {number} of {source}"
                step = f"Name a column that each row has; known here: {', '.join(row)}"
                raise ConfigError("data", column, rule, step)


def require_strings(rows: Sequence[Row], source: str, columns: Iterable[str]) -> None:
    """Refuse rows whose value in a column is no string.

    Raises:
        ConfigError: As :func:`require_columns`, or naming the row and what its value is.
    """
    columns = list(columns)
    require_columns(rows, source, columns)
    for column in columns:
        for number, row in enumerate(rows, 1):
            if not isinstance(row[column], str):
                kind = type(row[column]).__name__
                rule = f"row {number} of {source} holds {kind} in column {column!r}, not text"
                raise ConfigError("data", row[column], rule, "Name a column of text, or correct the row")


def text_columns(config: DataConfig) -> list[str]:
    """The columns that the config reads as text or conversation."""
    return [name for name in (config.messages, config.prompt, config.completion) if name] or [config.text]


def check_text(rows: Sequence[Row], config: DataConfig, source: str) -> None:
    """Refuse rows without what the config reads as text. Conversations are checked where they become tokens.

    Raises:
        ConfigError: As :func:`require_strings`.
    """
    check = require_columns if config.form == "messages" else require_strings
    check(rows, source, text_columns(config))


def _built_in(source: str) -> list[Row]:
    if source == "standard-library":
        return [{"text": text.read_source(path), "name": name} for name, path in text.library_files().items()]
    if source == "movie-reviews":
        return [asdict(review) for review in movie_reviews.read_reviews()]
    raise ConfigError(FIELD, source, "holds images, no rows of text", "Name another source, or another recipe")


def _of_path(path: Path, sample_by: SampleBy) -> list[Row]:
    if path.is_dir():
        return read_folder(path)
    if path.suffix not in READERS:
        rule = "is no built-in source, folder, or file of a known kind" if not path.exists() else "is of no known kind"
        kinds = f"{', '.join(BUILT_IN)}, {HUB}NAME, a folder of datasets, or a file that ends in {', '.join(READERS)}"
        raise ConfigError(FIELD, str(path), rule, f"Known: {kinds}")
    return read_text(path, sample_by) if path.suffix == ".txt" else READERS[path.suffix](path)
