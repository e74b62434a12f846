"""The ``kpt`` command as a shell runs it, in this process: the real ``main`` with its exit statuses."""

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from kpt_lightning.cli.main import main


@dataclass(frozen=True, slots=True)
class Done:
    """What a shell would see."""

    status: int
    out: str
    err: str


def kpt(*arguments: str) -> Done:
    """Run it; a traceback would leave here as the exception."""
    out, err = io.StringIO(), io.StringIO()
    wide = mock.patch.dict("os.environ", {"COLUMNS": "220", "NO_COLOR": "1", "TERM": "dumb"})
    words = mock.patch.object(sys, "argv", ["kpt", *arguments])
    with wide, words, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0
    return Done(status, out.getvalue(), err.getvalue())


def regress(store: object, command: str, *arguments: str) -> Done:
    """``kpt regress COMMAND --store STORE ...``."""
    return kpt("regress", command, "--store", str(store), *arguments)
