"""Runs in and out of a history as JSON Lines: one run a line, oldest first."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.store import RunStore

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did.

    Attributes:
        added: Ids of the runs that are new in the history, in order.
        known: Ids that it held already; nothing was changed.
        torn: The last line was cut off, as a killed writer leaves it, and was left out.
    """

    added: tuple[str, ...]
    known: tuple[str, ...]
    torn: bool = False


def export_runs(store: RunStore, path: str | Path) -> int:
    """Write every run; the file appears whole or not at all.

    Returns:
        How many.

    Raises:
        HistoryError: The store cannot be read, or the file not be written.
    """
    path, records = Path(path), store.all()
    lines = [{"kpt_runs": FORMAT_VERSION}, *(record.to_dict() for record in records)]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise HistoryError(f"export={str(path)!r}: cannot be written ({error}). Give another path.") from error
    return len(records)


def import_runs(store: RunStore, path: str | Path) -> Imported:
    """Add the runs of a file that :func:`export_runs` wrote; a second import adds nothing.

    Raises:
        HistoryError: The file cannot be read, is of a newer version, or a line that is not the last holds no run; runs
            before that line are added.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HistoryError(f"import={str(path)!r}: cannot be read ({error}). Check the path.") from error
    lines = text.splitlines()
    # A line that ends without its end was cut off, unless it can be read.
    torn = bool(lines) and not text.endswith("\n") and not _is_json(lines[-1])
    return add_runs(store, _records(path, lines[:-1] if torn else lines), torn=torn)


def add_runs(store: RunStore, records: Iterable[RunRecord], *, torn: bool = False) -> Imported:
    """Add those that the history does not know yet."""
    there = store.ids()
    added: list[str] = []
    known: list[str] = []
    for record in records:
        if record.run_id in there:
            known.append(record.run_id)
            continue
        store.add(record)
        there.add(record.run_id)
        added.append(record.run_id)
    return Imported(tuple(added), tuple(known), torn)


def _records(path: Path, lines: list[str]) -> Iterator[RunRecord]:
    for number, line in enumerate(lines, start=1):
        try:
            data: Any = json.loads(line)
        except ValueError as error:
            raise _wrong(path, number, f"is no JSON ({error})") from error
        if number == 1:
            version = data.get("kpt_runs") if isinstance(data, dict) else None
            if not isinstance(version, int) or version > FORMAT_VERSION:
                rule = "does not begin an export of kpt-lightning" if version is None else "is of a newer version"
                raise _wrong(path, number, rule)
            continue
        if not isinstance(data, dict):
            raise _wrong(path, number, "holds no run")
        yield RunRecord.from_dict(data)


def _wrong(path: Path, number: int, rule: str) -> HistoryError:
    return HistoryError(f"import={str(path)!r}, line {number}: {rule}. Export it again with kpt-lightning.")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
