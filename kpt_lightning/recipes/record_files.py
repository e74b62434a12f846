"""Rows from files: plain text, JSON, Parquet, and what the library ``datasets`` saves or downloads."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import DATASETS
from kpt_lightning.recipes.data_config import HUB, SampleBy

Row = dict[str, Any]

FIELD = "data.source"


def read_text(path: Path, sample_by: SampleBy = "paragraph") -> list[Row]:
    """One row with the column "text" for each paragraph, line or file; blank ones are no rows.

    Raises:
        ConfigError: The file cannot be read or is no UTF-8.
    """
    content = _decoded(path)
    parts = {"paragraph": re.split(r"\n[ \t]*\n", content), "line": content.split("\n"), "document": [content]}
    return [{"text": part.strip("\n")} for part in parts[sample_by] if part.strip()]


def read_json(path: Path) -> list[Row]:
    """One row for each object: of a list, or one a line.

    Raises:
        ConfigError: The file cannot be read, or a line, which is named, is no JSON object.
    """
    content = _decoded(path)
    if content.lstrip().startswith("["):
        rows = _parsed(content, path)
        return [_mapping(row, f"{path}, element {number}") for number, row in enumerate(rows, 1)]
    lines = ((number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip())
    return [_mapping(_parsed(line, path, number), f"{path}:{number}") for number, line in lines]


def read_parquet(path: Path) -> list[Row]:
    """One row for each row.

    Raises:
        ConfigError: The file cannot be read or is no Parquet.
        MissingDependencyError: ``datasets``, which brings pyarrow, is absent.
    """
    DATASETS.require("reading Parquet")
    from pyarrow import parquet

    _refuse_unreadable(path)
    try:
        return list(parquet.read_table(path).to_pylist())
    except (OSError, ValueError) as error:
        raise ConfigError(FIELD, str(path), f"is no Parquet: {error}", "Correct the file") from error


def read_folder(path: Path) -> list[Row]:
    """The rows of a folder that ``Dataset.save_to_disk`` wrote.

    Raises:
        ConfigError: It is no such folder, or holds several splits.
        MissingDependencyError: ``datasets`` is absent.
    """
    DATASETS.require("reading a folder of a data set")
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        rule = "is no folder that datasets.save_to_disk wrote"
        raise ConfigError(FIELD, str(path), rule, "Name such a folder, or a .jsonl, .parquet or .txt file") from error
    if isinstance(found, DatasetDict):
        splits = ", ".join(str(path / name) for name in found)
        raise ConfigError(FIELD, str(path), "holds several splits", f"Name the folder of one: {splits}")
    return [dict(row) for row in found]


def read_hub(name: str) -> list[Row]:
    """The rows of a split of a data set on the Hugging Face hub, or in the cache of an earlier download.

    Args:
        name: ``hub:NAME`` for the split "train", or ``hub:NAME:SPLIT``.

    Raises:
        ConfigError: It cannot be had; the reason is that of ``datasets``.
        MissingDependencyError: ``datasets`` is absent.
    """
    DATASETS.require("a data set of the hub")
    from datasets import load_dataset

    data_set, _, split = name.removeprefix(HUB).partition(":")
    try:
        return [dict(row) for row in load_dataset(data_set, split=split or "train")]
    except (OSError, ValueError, RuntimeError) as error:
        rule = f"cannot be loaded: {str(error).strip().rstrip('.')}"
        raise ConfigError(FIELD, name, rule, "Check name, split and connection, or name a local file") from error


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".txt": read_text,
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
}
"""By the end of the file's name."""


def _decoded(path: Path) -> str:
    _refuse_unreadable(path)
    content = path.read_bytes()
    try:
        # Some editors put a byte order mark in front.
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        rule = f"is no UTF-8 (byte {content[error.start]:#04x})"
        raise ConfigError(FIELD, f"{path}:{line}", rule, "Save the file as UTF-8") from error


def _refuse_unreadable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(FIELD, str(path), f"cannot be read ({error.strerror})", "Check the path") from error


def _parsed(content: str, path: Path, line: int = 1) -> Any:
    """The value of JSON text that begins at this line of the file."""
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        rule = f"is no JSON: {error.msg}, column {error.colno}"
        raise ConfigError(FIELD, f"{path}:{line + error.lineno - 1}", rule, "Correct the line") from error


def _mapping(row: object, place: str) -> Row:
    if not isinstance(row, dict):
        rule = f"is no JSON object but {type(row).__name__}"
        raise ConfigError(FIELD, place, rule, 'Write {"column": value, ...}')
    return row
