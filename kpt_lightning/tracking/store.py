"""The history of runs: append-only, crash-safe, in SQLite by default, in PostgreSQL for a team."""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from kpt_lightning.errors import ConfigError, HistoryError
from kpt_lightning.optional import PSYCOPG
from kpt_lightning.tracking import schema
from kpt_lightning.tracking.record import RunKey, RunRecord
from kpt_lightning.tracking.schema import SCHEMA_VERSION as SCHEMA_VERSION
from kpt_lightning.tracking.sqlite import is_writable, reading_engine, writing_engine

DEFAULT_PATH = Path(".kpt") / "runs.sqlite"
"""Under the current directory."""

LOCATION_VARIABLE = "KPT_HISTORY"


class RunStore:
    """Runs in the order in which they were added; nothing here changes or deletes one.

    Each run is one row written in one transaction (SQLite: WAL, synchronous FULL), so that a killed process leaves
    every committed run readable and none half-written. Connections are not kept open between calls. SQLite's WAL needs
    a local file system; for runs of several machines give a database URL, such as
    ``postgresql://user@host/database``. Runs then have the order in which they were stored, whatever the hosts' clocks.
    """

    def __init__(self, location: str | Path | None = None, *, reading: bool = False) -> None:
        """Choose the place; nothing is opened or created yet.

        Args:
            location: A path, or a database URL of SQLAlchemy's. None is ``KPT_HISTORY`` from the environment, else
                :data:`DEFAULT_PATH`.
            reading: Open a file that cannot be written without the write lock, to read it only; see ``read_only``.
        """
        place = str(location or os.environ.get(LOCATION_VARIABLE) or DEFAULT_PATH)
        self.url = sa.make_url(place if "://" in place else f"sqlite:///{place}")
        if self.url.drivername == "postgresql":
            # SQLAlchemy's default for it is a driver of the last decade.
            self.url = self.url.set(drivername="postgresql+psycopg")
        self._engine: sa.Engine | None = None
        self._reading = reading

    @property
    def place(self) -> str:
        """Path or URL for messages, without a password."""
        return (self.url.database or "") if self.is_file else self.url.render_as_string(hide_password=True)

    @property
    def read_only(self) -> bool:
        """Whether it is opened to read only, because the file or its directory cannot be written."""
        return self._reading and self.is_file and self.exists() and not is_writable(Path(self.url.database or ""))

    def exists(self) -> bool:
        """Whether there is something to open: a file that is not empty, or a server, which may be out of reach."""
        path = Path(self.url.database or "")
        return not self.is_file or (path.is_file() and path.stat().st_size > 0)

    def open(self) -> "RunStore":
        """Create what is missing, bring an older schema up to date, check the version.

        Raises:
            HistoryError: The place cannot be read or written, or a newer version of kpt-lightning made it.
        """
        with self.connect() as connection:
            schema.check_version(schema.read_version(connection), self.place)
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
        with self.connect() as connection:
            connection.execute(sa.insert(schema.runs).values(row))

    def like(self, key: RunKey, limit: int | None = None, status: str = "finished") -> list[RunRecord]:
        """Runs with this key, oldest first; with ``limit`` only the newest so many.

        Raises:
            HistoryError: The store cannot be read.
        """
        query = sa.select(schema.runs.c.record).where(
            schema.runs.c.key_digest == key.digest, schema.runs.c.status == status
        )
        return self._read(query, limit)

    def all(self, limit: int | None = None) -> list[RunRecord]:
        """All runs, oldest first; with ``limit`` only the newest so many.

        Raises:
            HistoryError: The store cannot be read.
        """
        return self._read(sa.select(schema.runs.c.record), limit)

    def ids(self) -> set[str]:
        """The ids of all runs.

        Raises:
            HistoryError: The store cannot be read.
        """
        self.open()
        with self.connect() as connection:
            return set(connection.execute(sa.select(schema.runs.c.run_id)).scalars())

    def get(self, run_id: str) -> RunRecord:
        """One run.

        Raises:
            HistoryError: There is none with this id.
        """
        found = self._read(sa.select(schema.runs.c.record).where(schema.runs.c.run_id == run_id), None)
        if not found:
            raise HistoryError(f"run={run_id!r}: not in {self.place!r}. List the runs with RunStore.all().")
        return found[0]

    def find(self, prefix: str) -> RunRecord:
        """The run whose id begins so; a whole id wins over longer ones.

        Raises:
            ConfigError: None or several begin so.
            HistoryError: The store cannot be read.
        """
        ids = self.ids()
        found = [prefix] if prefix in ids else sorted(each for each in ids if prefix and each.startswith(prefix))
        if not found:
            raise ConfigError("run", prefix, "no run of this history begins so", "List them with kpt regress history")
        if len(found) > 1:
            shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise ConfigError("run", prefix, f"{len(found)} runs begin so: {shown}", "Give more of the id")
        return self.get(found[0])

    def _read(self, query: "sa.Select[Any]", limit: int | None) -> list[RunRecord]:
        self.open()
        with self.connect() as connection:
            rows = connection.execute(query.order_by(schema.runs.c.sequence.desc()).limit(limit)).scalars().all()
        return [RunRecord.from_dict(self.parse(row)) for row in reversed(rows)]

    def parse(self, row: str) -> dict[str, Any]:
        """A row's data.

        Raises:
            HistoryError: It is no JSON object, as in a file that lost a part.
        """
        try:
            data = json.loads(row)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise HistoryError(
                f"history={self.place!r}: a row of it is damaged. Look with kpt regress doctor; restore a backup."
            )
        return data

    @property
    def is_file(self) -> bool:
        """Whether it is a SQLite file, not a server."""
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        """One transaction; SQLite's holds the write lock from the beginning, unless it is opened to read only.

        Raises:
            HistoryError: In place of every error of the database, with the place and the next step.
        """
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
        if self.read_only:
            return reading_engine(Path(self.url.database or ""))
        engine = writing_engine(self.url) if self.is_file else sa.create_engine(self.url, poolclass=NullPool)
        with engine.begin() as connection:
            schema.prepare(connection, self.place)
        return engine
