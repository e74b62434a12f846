"""What is not the same in two runs: environment, key, settings and plan."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kpt_lightning.tracking.fingerprint import CODE_KEY
from kpt_lightning.tracking.record import RunRecord

SECTIONS = ("environment", "key", "config", "plan")
"""First part of each name that :func:`differences` gives."""

MEASURED = frozenset({"seconds", "trials", "whole", "proofs"})
"""Parts of a plan that say what was measured and not what was done: unlike in any two runs."""

NAMED_BY = ("subject", "candidate")
"""Fields by which the entries of a plan's lists are told apart."""


def differences(before: RunRecord, after: RunRecord) -> dict[str, tuple[Any, Any]]:
    """What differs between two runs, of any two keys.

    Args:
        before: The older run.
        after: The newer run.

    Returns:
        Dotted name to (before, after), in the order of :data:`SECTIONS` and by name in each: ``environment.torch``,
        ``environment.git_commit``, ``key.precision``, ``config.batch``, ``plan.choices.fp8.accepted``. Values are
        JSON-like; one that a run lacks is None.
    """
    old, new = _facts(before), _facts(after)
    names = sorted(old.keys() | new.keys(), key=lambda name: (SECTIONS.index(name.partition(".")[0]), name))
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def environment_facts(run: RunRecord) -> dict[str, str]:
    """What surrounds the code: everything but the commit."""
    return {name: value for name, value in run.environment.items() if name != CODE_KEY}


def environment_changes(old: RunRecord, new: RunRecord) -> dict[str, tuple[str | None, str | None]]:
    """Name to (old, new) of everything around the code, without the commit, that is not the same."""
    then, now = environment_facts(old), environment_facts(new)
    names = sorted(then.keys() | now.keys())
    return {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}


def _facts(run: RunRecord) -> dict[str, Any]:
    key = {name: getattr(run.key, name) for name in run.key.__slots__}
    plan = {name: value for name, value in (run.plan or {}).items() if name not in MEASURED}
    parts = (run.environment, key, run.details.get("config", {}), plan)
    return {name: value for section, part in zip(SECTIONS, parts, strict=True) for name, value in _flat(section, part)}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of nested data by dotted name; a list of entries with names of their own counts as a mapping."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif (named := _by_name(value)) is not None:
        yield from _flat(name, named)
    else:
        yield name, value


def _by_name(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    for field in NAMED_BY:
        if all(isinstance(entry, Mapping) and field in entry for entry in value):
            rest = [{key: inner for key, inner in entry.items() if key not in (field, "reason")} for entry in value]
            return {str(entry[field]): inner for entry, inner in zip(value, rest, strict=True)}
    return None
