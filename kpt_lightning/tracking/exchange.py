"""A history into a file and out of it as JSON Lines: runs, baselines and acknowledgements, oldest first.

The first line holds the version, each other line says its kind. A file of version 1 holds runs without a kind and is
read as well; kpt-lightning that wrote version 1 refuses newer files by their first line.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kpt_lightning.errors import HistoryError
from kpt_lightning.tracking import decisions
from kpt_lightning.tracking.decisions import Decisions
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.store import RunStore

FORMAT_VERSION = 2
"""1: runs. 2: also baselines and acknowledgements, and a kind in each line."""

RUN = "run"


@dataclass(frozen=True, slots=True)
class Exported:
    """How many of each kind a file holds."""

    runs: int
    baselines: int
    acks: int


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did.

    Attributes:
        added: Ids of the runs that are new in the history, in order.
        known: Ids that it held already; nothing was changed.
        torn: The last line was cut off, as a killed writer leaves it, and was left out.
        baselines: Pins that are new.
        acks: Acknowledgements that are new.
        superseded: Of both, those left out because the history holds a later one for the same runs.
    """

    added: tuple[str, ...]
    known: tuple[str, ...]
    torn: bool = False
    baselines: int = 0
    acks: int = 0
    superseded: int = 0


def export_history(store: RunStore, path: str | Path) -> Exported:
    """Write everything; the file appears whole or not at all.

    Raises:
        HistoryError: The store cannot be read, or the file not be written.
    """
    path, records = Path(path), store.all()
    decided = decisions.lines(store)
    runs = ({"kind": RUN, **record.to_dict()} for record in records)
    lines = [{"kpt_runs": FORMAT_VERSION}, *runs, *decided]
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
    kinds = Counter(line["kind"] for line in decided)
    return Exported(len(records), kinds[decisions.BASELINE], kinds[decisions.ACKNOWLEDGED])


def import_history(store: RunStore, path: str | Path) -> Imported:
    """Add what a file of :func:`export_history` holds; a second import adds nothing.

    Raises:
        HistoryError: The file cannot be read, is of a newer version, or a line that is not the last has another form;
            runs before that line are added, baselines and acknowledgements not.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HistoryError(f"import={str(path)!r}: cannot be read ({error}). Check the path.") from error
    lines = text.splitlines()
    # A line that ends without its end was cut off, unless it can be read.
    torn = bool(lines) and not text.endswith("\n") and not _is_json(lines[-1])
    decided = Decisions()
    done = add_runs(store, _records(path, lines[:-1] if torn else lines, decided), torn=torn)
    added = decisions.add(store, decided)
    return replace(done, baselines=added.baselines, acks=added.acks, superseded=added.superseded)


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


def _records(path: Path, lines: list[str], decided: Decisions) -> Iterator[RunRecord]:
    """The runs of the lines; what is no run goes into ``decided``."""
    for number, line in enumerate(lines, start=1):
        try:
            data: Any = json.loads(line)
        except ValueError as error:
            raise _wrong(path, number, f"is no JSON ({error})") from error
        if number == 1:
            _check_version(path, data)
            continue
        if not isinstance(data, dict):
            raise _wrong(path, number, "holds no run")
        kind = data.pop("kind", RUN)
        if kind == RUN:
            yield RunRecord.from_dict(data)
        elif kind in decisions.KINDS:
            try:
                decided.read(kind, data)
            except ValueError as error:
                raise _wrong(path, number, f"does not have the form of this version ({error})") from error
        else:
            raise _wrong(path, number, f"is of a kind that this version does not know ({kind!r})")


def _check_version(path: Path, head: Any) -> None:
    version = head.get("kpt_runs") if isinstance(head, dict) else None
    if not isinstance(version, int):
        raise _wrong(path, 1, "does not begin an export of kpt-lightning")
    if version > FORMAT_VERSION:
        raise HistoryError(
            f"import={str(path)!r}, line 1: is of a newer version ({version}; this kpt-lightning reads up to "
            f"{FORMAT_VERSION}). Upgrade kpt-lightning."
        )


def _wrong(path: Path, number: int, rule: str) -> HistoryError:
    return HistoryError(f"import={str(path)!r}, line {number}: {rule}. Export it again with kpt-lightning.")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
