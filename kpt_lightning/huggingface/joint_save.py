"""Several processes write one folder, which appears as a whole.

Some scripts let every process call ``save_state`` and some only the first, so that nobody may wait for a process that
never comes. Where the save itself is a collective (sharded models), all wait for all; else the processes tell each
other through the process group's store that they are there.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from kpt_lightning.errors import KptError
from kpt_lightning.huggingface.atomic_folder import Place, held, pour, staged

GRACE = timedelta(seconds=5)
"""How long the first process waits, once, for others that may never come. They run in step up to the last all-reduce;
who comes later adds its own files, each of them atomic."""

_FAILED, _DONE = b"failed", b"done"
_LONG = default_pg_timeout
_POLL_SECONDS = 0.01
_saves: Counter[str] = Counter()
_alone: set[int] = set()


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that save.

    Attributes:
        index: 0 leads.
        count: Processes of the run.
        leads_node: Whether it is the first one of its machine.
        together: Every process is sure to call, as the save is a collective.
        barrier: Waits for all processes.
    """

    index: int
    count: int
    leads_node: bool
    together: bool
    barrier: Callable[[], None]

    @classmethod
    def of(cls, accelerator: Any, *, together: bool = False) -> "Ranks":
        """Those of an Accelerator.

        Args:
            accelerator: An ``accelerate.Accelerator``.
            together: Every process is known to call.
        """
        collective = str(accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")
        return cls(
            accelerator.process_index, accelerator.num_processes, accelerator.is_local_main_process,
            together or collective or not dist.is_initialized(), accelerator.wait_for_everyone,
        )  # fmt: skip


def save_jointly(place: Place, write: Callable[[Path], Any], ranks: Ranks) -> None:
    """Let each process write, and put the whole in its place.

    Args:
        place: Of the folder.
        write: Writes this process's files into the folder that it is given.
        ranks: The processes.

    Raises:
        FileExistsError: There is a file of that name.
        KptError: Another process could not write its files; the folder is what it was.
    """
    if place.target.exists() and not place.target.is_dir():
        raise FileExistsError(f"{place.target} is a file; a checkpoint is a folder")
    if ranks.count == 1:
        place.clean()
        with staged(place, "rank0") as staging:
            write(staging)
            place.commit([staging])
    elif ranks.together:
        _all_in_one(place, write, ranks)
    elif ranks.index == 0:
        _lead(place, write, ranks)
    else:
        _follow(place, write, ranks)


def _all_in_one(place: Place, write: Callable[[Path], Any], ranks: Ranks) -> None:
    staging = place.staging("all")
    if ranks.index == 0:
        place.clean()
        shutil.rmtree(staging.parent, ignore_errors=True)
    ranks.barrier()
    staging.mkdir(parents=True, exist_ok=True)
    with held(staging.parent):
        write(staging)
        ranks.barrier()
        if ranks.index == 0:
            place.commit([staging])
        ranks.barrier()
        # A machine with a disk of its own.
        if ranks.leads_node and staging.is_dir():
            place.commit([staging])
        ranks.barrier()
    shutil.rmtree(staging.parent, ignore_errors=True)


def _lead(place: Place, write: Callable[[Path], Any], ranks: Ranks) -> None:
    store, key = _store(), _key(place)
    store.set(f"{key}/leader", b"here")
    outcome = _FAILED
    try:
        place.clean()
        with staged(place, "rank0") as staging:
            write(staging)
            came = _those_that_came(store, key, ranks.count)
            if failed := [rank for rank in came if _outcome(store, f"{key}/{rank}/staged") != _DONE]:
                raise KptError(f"process {failed[0]} could not write its part of {place.target}; see its error above")
            others = [place.staging(f"rank{rank}") for rank in came]
            place.commit([staging, *(each for each in others if each.is_dir())])
            outcome = _DONE
    finally:
        store.set(f"{key}/outcome", outcome)


def _follow(place: Place, write: Callable[[Path], Any], ranks: Ranks) -> None:
    store, key = _store(), _key(place)
    store.set(f"{key}/{ranks.index}/here", b"here")
    outcome = _FAILED
    with staged(place, f"rank{ranks.index}") as staging:
        try:
            write(staging)
            outcome = _DONE
        finally:
            store.set(f"{key}/{ranks.index}/staged", outcome)
        if _wait(store, [f"{key}/leader"], GRACE) and _outcome(store, f"{key}/outcome") != _DONE:
            raise KptError(f"process 0 could not write its part of {place.target}; see its error above")
        # Too late for the first process, or a machine with a disk of its own.
        if staging.is_dir():
            pour(staging, place.target)


def _those_that_came(store: Any, key: str, count: int) -> list[int]:
    """Ranks that call, too. Where none came before, nobody is waited for again."""
    ranks = range(1, count)
    grace = timedelta(0) if id(store) in _alone else GRACE
    _wait(store, [f"{key}/{rank}/here" for rank in ranks], grace)
    came = [rank for rank in ranks if store.check([f"{key}/{rank}/here"])]
    (_alone.discard if came else _alone.add)(id(store))
    return came


def _wait(store: Any, keys: list[str], timeout: timedelta) -> bool:
    """Whether all keys are set in time. The store's own waiting writes a warning of the system's when it is not."""
    end = time.monotonic() + timeout.total_seconds()
    while not store.check(keys):
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _outcome(store: Any, key: str) -> bytes:
    return bytes(store.get(key)) if _wait(store, [key], _LONG) else _FAILED


def _store() -> Any:
    # Private, as there is no public way to a store that the run already has.
    return dist.distributed_c10d._get_default_store()


def _key(place: Place) -> str:
    """The same in every process for the same save: a folder may be written again and again."""
    name = str(place.target)
    _saves[name] += 1
    return f"kpt/save/{_saves[name]}/{name}"
