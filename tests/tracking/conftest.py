"""A real PostgreSQL server of the tests' own."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Debian keeps each version's programs off the path.
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


def _unprivileged() -> str | None:
    """The server refuses to run as root; another account's name then, None where this one will do."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        pytest.skip("as root, PostgreSQL needs the account 'postgres' of Debian's package")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of an empty server without a network port, for the session."""
    initdb = shutil.which("initdb") or (str(PROGRAMS[-1]) if PROGRAMS else None)
    if initdb is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt install postgresql)")
    user = _unprivileged()
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        if user is not None:
            for place in (folder, data):
                shutil.chown(place, user)
        run = {"user": user, "check": True, "capture_output": True, "text": True, "cwd": folder}
        subprocess.run([initdb, "-D", data, "-U", "kpt", "-A", "trust", "-N"], **run)
        control = [str(Path(initdb).with_name("pg_ctl")), "-D", str(data), "-w"]
        settings = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
        # Its output stays open as long as it runs, so it goes to a file.
        log = Path(folder) / "log"
        subprocess.run([*control, "-o", settings, "-l", str(log), "start"], **run | {"capture_output": False})
        try:
            yield f"postgresql://kpt@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **run | {"capture_output": False})
