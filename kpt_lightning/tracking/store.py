"""The history of runs: append-only, crash-safe, in SQLite by default, in PostgreSQL for a team."""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from kpt_lightning.errors import HistoryError
from kpt_lightning.optional import PSYCOPG
from kpt_lightning.tracking.record import RunKey, RunRecord

DEFAULT_PATH = Path(".kpt") / "runs.sqlite"
"""Under the current directory."""

LOCATION_VARIABLE = "KPT_HISTORY"
SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0
FIRST_USE_LOCK = 0x6B7074
"""Of PostgreSQL's advisory locks: "kpt"."""

_metadata = sa.MetaData()
_schema = sa.Table("kpt_schema", _metadata, sa.Column("version", sa.Integer, primary_key=True))
_runs = sa.Table(
    "kpt_runs",
    _metadata,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.String(64), nullable=False, unique=True),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("key_digest", sa.String(64), nullable=False, index=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("record", sa.Text, nullable=False),
)


class RunStore:
    """Runs in the order in which they were added; nothing here changes or deletes one.

    Each run is one row written in one transaction (SQLite: WAL, synchronous FULL), so that a killed process leaves
    every committed run readable and none half-written. Connections are not kept open between calls. SQLite's WAL needs
    a local file system; for runs of several machines give a database URL, such as
    ``postgresql://user@host/database``. Runs then have the order in which they were stored, whatever the hosts' clocks.
    """

    def __init__(self, location: str | Path | None = None) -> None:
        """Choose the place; nothing is opened or created yet.

        Args:
            location: A path, or a database URL of SQLAlchemy's. None is ``KPT_HISTORY`` from the environment, else
                :data:`DEFAULT_PATH`.
        """
        place = str(location or os.environ.get(LOCATION_VARIABLE) or DEFAULT_PATH)
        self.url = sa.make_url(place if "://" in place else f"sqlite:///{place}")
        if self.url.drivername == "postgresql":
            # SQLAlchemy's default for it is a driver of the last decade.
            self.url = self.url.set(drivername="postgresql+psycopg")
        self._engine: sa.Engine | None = None

    @property
    def place(self) -> str:
        """Path or URL for messages, without a password."""
        return (self.url.database or "") if self._is_file else self.url.render_as_string(hide_password=True)

    def open(self) -> "RunStore":
        """Create what is missing and check the schema version.

        Raises:
            HistoryError: The place cannot be read or written, or a newer version of kpt-lightning made it.
        """
        with self._connect() as connection:
            version = connection.execute(sa.select(sa.func.max(_schema.c.version))).scalar_one()
        if version != SCHEMA_VERSION:
            raise HistoryError(
                f"history={self.place!r}: its schema has version {version}, this kpt-lightning reads version "
                f"{SCHEMA_VERSION}. Upgrade kpt-lightning, or set {LOCATION_VARIABLE} to another file."
            )
        return self

    def add(self, record: RunRecord) -> None:
        """Append one run; on return it is on disk.

        Raises:
            HistoryError: The store cannot be written or already holds this run id.
        """
        row = {
            "run_id": record.run_id,
            "created_at": record.created_at,
            "key_digest": record.key.digest,
            "status": record.status,
            "record": json.dumps(record.to_dict(), allow_nan=False),
        }
        self.open()
        with self._connect() as connection:
            connection.execute(sa.insert(_runs).values(row))

    def like(self, key: RunKey, limit: int | None = None, status: str = "finished") -> list[RunRecord]:
        """Runs with this key, oldest first; with ``limit`` only the newest so many.

        Raises:
            HistoryError: The store cannot be read.
        """
        query = sa.select(_runs.c.record).where(_runs.c.key_digest == key.digest, _runs.c.status == status)
        return self._read(query, limit)

    def all(self, limit: int | None = None) -> list[RunRecord]:
        """All runs, oldest first; with ``limit`` only the newest so many.

        Raises:
            HistoryError: The store cannot be read.
        """
        return self._read(sa.select(_runs.c.record), limit)

    def ids(self) -> set[str]:
        """The ids of all runs.

        Raises:
            HistoryError: The store cannot be read.
        """
        self.open()
        with self._connect() as connection:
            return set(connection.execute(sa.select(_runs.c.run_id)).scalars())

    def get(self, run_id: str) -> RunRecord:
        """One run.

        Raises:
            HistoryError: There is none with this id.
        """
        found = self._read(sa.select(_runs.c.record).where(_runs.c.run_id == run_id), None)
        if not found:
            raise HistoryError(f"run={run_id!r}: not in {self.place!r}. List the runs with RunStore.all().")
        return found[0]

    def _read(self, query: "sa.Select[Any]", limit: int | None) -> list[RunRecord]:
        self.open()
        with self._connect() as connection:
            rows = connection.execute(query.order_by(_runs.c.sequence.desc()).limit(limit)).scalars().all()
        return [RunRecord.from_dict(json.loads(row)) for row in reversed(rows)]

    @property
    def _is_file(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def _connect(self) -> Iterator[sa.Connection]:
        """One transaction; every error of the database becomes a HistoryError with the place and the next step."""
        try:
            if self._engine is None:
                self._engine = self._make_engine()
            with self._engine.begin() as connection:
                yield connection
        except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError, ModuleNotFoundError) as error:
            cause = getattr(error, "orig", None) or error
            raise HistoryError(
                f"history={self.place!r}: cannot be read or written ({cause}). Check that the path is a run history "
                f"that you may write, or set {LOCATION_VARIABLE} to another file."
            ) from error

    def _make_engine(self) -> sa.Engine:
        if self.url.drivername == "postgresql+psycopg":
            PSYCOPG.require(f"history={self.place!r}")
        engine = sa.create_engine(self.url, poolclass=NullPool)
        if self._is_file:
            if self.url.database:
                Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
            sa.event.listen(engine, "connect", _on_connect)
            sa.event.listen(engine, "begin", _on_begin)
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                # Two first writers would both make the tables; SQLite holds the write lock from the beginning.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(FIRST_USE_LOCK)))
            if not sa.inspect(connection).has_table(_schema.name):
                _metadata.create_all(connection)
                connection.execute(sa.insert(_schema).values(version=SCHEMA_VERSION))
        return engine


def _on_connect(connection: Any, _record: Any) -> None:
    # The driver must not open transactions of its own: _on_begin does, with the write lock taken at once.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}")
    _set_wal(connection)
    connection.execute("PRAGMA synchronous=FULL")


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


def _on_begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
