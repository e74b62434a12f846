"""The history in a real PostgreSQL: the same promises as in a file, for several hosts."""

import subprocess
import sys
import uuid
from typing import Any

import pytest
import sqlalchemy as sa

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking.store import SCHEMA_VERSION, RunStore
from tests.tracking.test_store import MAKE, make


@pytest.fixture
def url(postgres: str) -> str:
    """A database of this test's own."""
    name = f"t{uuid.uuid4().hex}"
    engine = sa.create_engine(postgres.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return postgres.replace("/postgres?", f"/{name}?")


def test_what_is_added_comes_back_equal_in_order(url: str) -> None:
    store, records = RunStore(url), [make(str(index)) for index in range(5)]
    for record in records:
        store.add(record)
    assert RunStore(url).all() == records
    assert RunStore(url).get("3") == records[3]
    assert store.ids() == {"0", "1", "2", "3", "4"}
    assert [record.run_id for record in store.like(records[0].key, limit=2)] == ["3", "4"]


def test_hosts_that_write_at_once_from_the_first_moment_lose_nothing(url: str, tmp_path: Any) -> None:
    (tmp_path / "tests_writer.py").write_text(MAKE)
    code = (
        "import sys\nfrom tests_writer import make\nfrom kpt_lightning.tracking.store import RunStore\n"
        "store = RunStore(sys.argv[1])\nfor n in range(25): store.add(make(f'{sys.argv[2]}-{n}'))\n"
    )
    (tmp_path / "writer.py").write_text(code)
    hosts = [subprocess.Popen([sys.executable, str(tmp_path / "writer.py"), url, label]) for label in "abc"]
    assert [host.wait() for host in hosts] == [0, 0, 0]
    stored = [record.run_id for record in RunStore(url).all()]
    assert set(stored) == {f"{label}-{number}" for label in "abc" for number in range(25)}
    for label in "abc":
        assert [each for each in stored if each.startswith(label)] == [f"{label}-{number}" for number in range(25)]


def test_the_same_run_twice_is_refused_and_the_first_one_stays(url: str) -> None:
    store = RunStore(url)
    store.add(make("1"))
    with pytest.raises(HistoryError, match="cannot be read or written"):
        store.add(make("1", status="failed"))
    assert store.all() == [make("1")]


def test_a_newer_schema_is_refused_and_left_alone(url: str) -> None:
    RunStore(url).open()
    engine = sa.create_engine(RunStore(url).url)
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE kpt_schema SET version = {SCHEMA_VERSION + 1}"))
    engine.dispose()
    with pytest.raises(HistoryError, match="Upgrade kpt-lightning"):
        RunStore(url).open()


def test_a_server_that_is_not_there_is_refused_with_the_next_step() -> None:
    with pytest.raises(HistoryError, match="KPT_HISTORY"):
        RunStore("postgresql://kpt:secret@/x?host=/nowhere").open()
