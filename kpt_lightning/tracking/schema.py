"""Tables of a history and the steps from older versions of them."""

import sqlalchemy as sa

from kpt_lightning.errors import HistoryError

SCHEMA_VERSION = 2
"""1: runs. 2: also baselines and acknowledgements."""

FIRST_USE_LOCK = 0x6B7074
"""Of PostgreSQL's advisory locks: "kpt"."""

metadata = sa.MetaData()

versions = sa.Table("kpt_schema", metadata, sa.Column("version", sa.Integer, primary_key=True))

runs = sa.Table(
    "kpt_runs",
    metadata,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.String(64), nullable=False, unique=True),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("key_digest", sa.String(64), nullable=False, index=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("record", sa.Text, nullable=False),
)

baselines = sa.Table(
    "kpt_baselines",
    metadata,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("name", sa.String(255), nullable=False, index=True),
    sa.Column("event", sa.Text, nullable=False),
)

acks = sa.Table(
    "kpt_acks",
    metadata,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("event", sa.Text, nullable=False),
)

ADDED = {2: (baselines, acks)}
"""Version -> tables that it added. Rows are only ever appended; no step changes or removes one."""


def prepare(connection: sa.Connection, place: str) -> None:
    """Make the tables of a new history, or bring an older one up to date, in the transaction of ``connection``.

    Args:
        connection: Inside a transaction that holds the write lock in SQLite; PostgreSQL's is taken here.
        place: Path or URL for messages.

    Raises:
        HistoryError: As :func:`check_version`; nothing was changed then.
    """
    if connection.dialect.name == "postgresql":
        # Two first openers would both make the tables; SQLite holds the write lock from the beginning.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(FIRST_USE_LOCK)))
    if not sa.inspect(connection).has_table(versions.name):
        metadata.create_all(connection)
        connection.execute(sa.insert(versions).values(version=SCHEMA_VERSION))
        return
    found = read_version(connection)
    if found is None or not 1 <= found < SCHEMA_VERSION:
        check_version(found, place)
        return
    for version in range(found + 1, SCHEMA_VERSION + 1):
        metadata.create_all(connection, tables=ADDED[version])
    connection.execute(sa.update(versions).values(version=SCHEMA_VERSION))


def read_version(connection: sa.Connection) -> int | None:
    """The version of the tables, None where the history lost it."""
    found: int | None = connection.execute(sa.select(sa.func.max(versions.c.version))).scalar_one()
    return found


def check_version(version: int | None, place: str) -> None:
    """Refuse tables that this version does not know.

    Raises:
        HistoryError: They are newer, or their version is lost.
    """
    if version is None:
        raise HistoryError(
            f"history={place!r}: holds no schema version, so it is damaged. Restore it from a backup or an export."
        )
    if 1 <= version < SCHEMA_VERSION:
        raise HistoryError(
            f"history={place!r}: its schema has version {version} and it cannot be written, so it cannot be brought to "
            f"version {SCHEMA_VERSION}. Open it once where it can be written, or copy it."
        )
    if version != SCHEMA_VERSION:
        raise HistoryError(
            f"history={place!r}: its schema has version {version}, this kpt-lightning reads version "
            f"{SCHEMA_VERSION}. Upgrade kpt-lightning, or set KPT_HISTORY to another file."
        )
