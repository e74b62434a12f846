"""A history in a SQLite file: opened to write, or only to read where the file or its directory cannot be written."""

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from kpt_lightning.tracking import schema

BUSY_SECONDS = 30.0

SMALLEST_FILE = 512
"""Bytes of the smallest page of a SQLite file: https://www.sqlite.org/fileformat.html"""


def is_writable(path: Path) -> bool:
    """Whether a history there can be written: WAL also makes files beside it."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def writing_engine(url: sa.URL) -> sa.Engine:
    """Engine whose transactions hold the write lock from the beginning; makes the file and its directory."""
    if url.database:
        _make_room(Path(url.database))
    engine = sa.create_engine(url, poolclass=NullPool)
    sa.event.listen(engine, "connect", _on_connect)
    sa.event.listen(engine, "begin", lambda connection: _begin(connection, "BEGIN IMMEDIATE"))
    return engine


def reading_engine(path: Path) -> sa.Engine:
    """Engine that takes no lock, makes no file and can change nothing.

    A file without a write-ahead log is opened as immutable, the only way without a file for locks beside it; with one
    SQLite needs the lock file of the process that writes there, and says so where it is missing:
    https://www.sqlite.org/wal.html#read_only_databases
    """
    log = path.with_name(f"{path.name}-wal")
    immutable = not (log.exists() and log.stat().st_size)
    place = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if immutable else ''}"
    engine = sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(place, uri=True), poolclass=NullPool)
    sa.event.listen(engine, "connect", _on_connect_to_read)
    sa.event.listen(engine, "begin", lambda connection: _begin(connection, "BEGIN"))
    return engine


def _make_room(path: Path) -> None:
    """Make the directory; refuse a few bytes of something else, which SQLite would take for a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and 0 < path.stat().st_size < SMALLEST_FILE:
        raise sqlite3.DatabaseError(f"file of {path.stat().st_size} bytes is not a database")


def _on_connect(connection: Any, record: Any) -> None:
    _on_connect_to_read(connection, record)
    _set_wal(connection)
    connection.execute("PRAGMA synchronous=FULL")


def _on_connect_to_read(connection: Any, _record: Any) -> None:
    # The driver must not open transactions of its own: the engine's event does.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}")
    _refuse_foreign(connection)


def _refuse_foreign(connection: Any) -> None:
    """Raise before the first write to a database that another program made."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and schema.versions.name not in tables:
        shown = ", ".join(sorted(tables)[:3])
        raise sqlite3.DatabaseError(f"it is a database of something else, with the tables {shown}")


def _set_wal(connection: Any) -> None:
    """Switch to WAL; SQLite's busy timeout does not cover the switch, so two first writers need the retry."""
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def _begin(connection: sa.Connection, statement: str) -> None:
    connection.exec_driver_sql(statement)
