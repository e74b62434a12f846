"""A folder that is replaced as a whole: written beside its place, flushed to disk, then exchanged with what was there.

At any moment, also after kill -9 or a power cut, the name holds the old folder or the new one and never a mixture.
"""

import ctypes
import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PARTIAL = ".kpt-partial"
"""Ends the name of a folder that is being written, or that a killed process left."""
OLD = ".kpt-old"
"""Ends the name of what was there before, for a moment, where the filesystem cannot exchange two names."""

# linux/fcntl.h and linux/fs.h
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a folder goes and where it is prepared, on one filesystem.

    Attributes:
        target: Its final name, without symbolic links.
        beside: Folder that holds the unfinished ones.
    """

    target: Path
    beside: Path

    @classmethod
    def of(cls, target: str | os.PathLike[str], *, beside: str | os.PathLike[str] | None = None) -> "Place":
        """The place of ``target``.

        Args:
            target: Need not exist.
            beside: For unfinished folders, where the target's parent will not do; None takes that parent.
        """
        real = Path(os.path.realpath(target))
        if _fixed(real):
            return cls(real, real)
        aside = real.parent if beside is None else Path(os.path.realpath(beside))
        one_disk = not (aside.is_dir() and real.parent.is_dir()) or aside.stat().st_dev == real.parent.stat().st_dev
        return cls(real, aside if one_disk else real.parent)

    def staging(self, part: str) -> Path:
        """Unfinished folder of one writer; it has the name of the target, in a hidden folder of its own."""
        return self.beside / f".{self.target.name}.{part}{PARTIAL}" / self.target.name

    @property
    def old(self) -> Path:
        """Name of what was there before, between two renames."""
        return self.beside / f".{self.target.name}{OLD}"

    def recover(self) -> None:
        """Bring back what a process killed between two renames had moved aside."""
        if self.old.is_dir() and not self.target.exists():
            with suppress(FileNotFoundError):
                self.old.rename(self.target)

    def clean(self) -> None:
        """Remove what killed processes left; folders that a living process writes stay."""
        self.recover()
        shutil.rmtree(self.old, ignore_errors=True)
        for left in [*self.beside.glob(f".*{PARTIAL}")] if self.beside.is_dir() else []:
            with suppress(FileNotFoundError), held(left) as mine:
                if mine:
                    shutil.rmtree(left, ignore_errors=True)

    def commit(self, written: Sequence[Path]) -> None:
        """Put what was written in its place.

        What the old folder holds and nobody wrote anew stays there, as when writing straight into it.

        Args:
            written: Unfinished folders; those after the first are poured into it.
        """
        first, *others = written
        for other in others:
            pour(other, first)
        if self.beside == self.target:
            warnings.warn(
                f"{self.target} is a working directory or a mount point, or its parent cannot be written: it cannot be "
                "exchanged as a whole, and its files are replaced one by one. Save into a folder below it",
                stacklevel=2,
            )
            pour(first, self.target)
            return
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if self.target.is_dir():
            _carry(self.target, first)
            first.chmod(self.target.stat().st_mode & 0o7777)
        flush(first)
        self._swap(first)
        _flush_one(self.target.parent)

    def _swap(self, new: Path) -> None:
        if not self.target.exists():
            new.rename(self.target)
        elif exchange(new, self.target):
            # By another name at once, lest it be taken for the new one.
            replaced = new.rename(new.with_name(f"{new.name}.replaced"))
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            self.target.rename(self.old)
            new.rename(self.target)
            shutil.rmtree(self.old, ignore_errors=True)

    def remove(self) -> None:
        """Delete the folder; it is whole until its name is gone."""
        with staged(self, "deleted") as gone:
            self.target.rename(gone)


@contextmanager
def staged(place: Place, part: str) -> Iterator[Path]:
    """An empty unfinished folder, locked so that no other process removes it, and gone afterwards in any case."""
    folder = place.staging(part)
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    with held(folder.parent):
        try:
            yield folder
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, which ends with the process.

    Yields:
        False where a living process holds it, or where the filesystem cannot tell.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step; False where system or filesystem cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def pour(source: Path, target: Path) -> None:
    """Move each file of ``source`` into ``target``, over those of the same name; ``source`` is gone afterwards."""
    flush(source)
    target.mkdir(parents=True, exist_ok=True)
    for entry in [*source.iterdir()]:
        if entry.is_dir() and not entry.is_symlink():
            pour(entry, target / entry.name)
        else:
            entry.replace(target / entry.name)
    source.rmdir()
    _flush_one(target)


def flush(folder: Path) -> None:
    """Return when everything in it is on disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            _flush_one(Path(path, name))
        _flush_one(Path(path))


def _flush_one(path: Path) -> None:
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _carry(old: Path, new: Path) -> None:
    """Give ``new`` what only ``old`` has, as second names of the same files, so that open ones go on."""
    for entry in old.iterdir():
        there = new / entry.name
        if entry.is_dir() and not entry.is_symlink():
            if not there.exists():
                there.mkdir(mode=entry.stat().st_mode & 0o7777)
            if there.is_dir():
                _carry(entry, there)
        elif not os.path.lexists(there):
            try:
                os.link(entry, there, follow_symlinks=False)
            except OSError:
                shutil.copy2(entry, there, follow_symlinks=False)


def _fixed(target: Path) -> bool:
    """Whether its name cannot be given to another folder."""
    if not target.is_dir():
        return False
    return os.path.ismount(target) or Path.cwd().is_relative_to(target) or not os.access(target.parent, os.W_OK)
