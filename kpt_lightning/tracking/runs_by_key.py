"""Which keys and runs of a history a command means."""

from collections.abc import Mapping, Sequence

from kpt_lightning.errors import ConfigError
from kpt_lightning.tracking.check import finished_by_key
from kpt_lightning.tracking.differences import environment_changes
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.thresholds import GATE_FEWEST_RUNS

ByKey = Mapping[str, Sequence[RunRecord]]


def choose_keys(by_key: ByKey, *, key: str | None = None, name: str | None = None) -> dict[str, list[RunRecord]]:
    """The keys that are meant; all without ``key`` and ``name``.

    Args:
        by_key: Key digest to its runs.
        key: A digest or its beginning.
        name: Of the runs.

    Raises:
        ConfigError: No key or name is so, or several keys begin with ``key``.
    """
    found = {digest: list(runs) for digest, runs in by_key.items() if key is None or digest.startswith(key)}
    if key is not None and len(found) != 1:
        rule = f"{len(found)} keys of finished runs begin so" if found else "no key of a finished run begins so"
        raise ConfigError("--key", key, rule, "List the keys with kpt regress doctor")
    if name is None:
        return found
    named = {digest: runs for digest, runs in found.items() if runs[-1].key.name == name}
    if not named:
        known = ", ".join(sorted({runs[-1].key.name for runs in found.values()})[:5]) or "none"
        raise ConfigError("--name", name, f"no finished run has this name; there are: {known}", "Give one of these")
    return named


def one_key(records: Sequence[RunRecord], *, key: str | None = None, name: str | None = None) -> str:
    """The digest of the one key that is meant.

    Raises:
        ConfigError: None or several are.
    """
    found = choose_keys(finished_by_key(records), key=key, name=name)
    if len(found) == 1:
        return next(iter(found))
    field, value = ("--name", name) if name is not None else ("--key", key)
    shown = ", ".join(f"{digest} ({runs[-1].key.name})" for digest, runs in list(found.items())[:5]) or "none"
    raise ConfigError(field, value, f"must mean one key; there are: {shown}", "Give the digest with --key")


def runs_to_pin(
    by_key: ByKey, asked: Sequence[RunRecord], last: int
) -> tuple[dict[str, list[RunRecord]], list[str]]:  # fmt: skip
    """The runs of each key for a baseline: those asked for, else the newest in the newest one's environment.

    Args:
        by_key: Key digest to its finished runs, oldest first.
        asked: Runs that the user named; may be empty.
        last: How many of each key otherwise.

    Returns:
        Key digest to runs, oldest first, and a sentence for each key that has too few of them to judge others by.

    Raises:
        ConfigError: A run that was asked for is not finished, or its key is not in ``by_key``.
    """
    asked_ids = {run.run_id for run in asked}
    known = {run.run_id for runs in by_key.values() for run in runs}
    for run in asked:
        if run.run_id not in known:
            rule = f"is {run.status}, of the key {run.key.digest}"
            raise ConfigError("--run", run.run_id, rule, "Pin finished runs of the chosen key")
    chosen, left_out = {}, []
    for digest, runs in by_key.items():
        if asked:
            picked = [run for run in runs if run.run_id in asked_ids]
        else:
            picked = [run for run in runs if not environment_changes(run, runs[-1])][-last:]
        if len(picked) >= GATE_FEWEST_RUNS:
            chosen[digest] = picked
        elif picked:
            left_out.append(
                f"{runs[-1].key.name} [{digest}]: {len(picked)} runs in one environment; a baseline needs "
                f"{GATE_FEWEST_RUNS} to judge others by"
            )
    return chosen, left_out
