"""Finding candidates: each module of this package that names one, and the entry points of other packages."""

import functools
import pkgutil
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module, metadata

import kpt_lightning.candidates as package
from kpt_lightning.candidates.candidate import Candidate
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import ConfigError

Supports = Callable[[str], Decision]

ENTRY_POINTS = "kpt_lightning.candidates"
"""Group of entry points under which another package offers a candidate object."""


def candidates() -> tuple[Candidate, ...]:
    """All candidates in the order of their turn.

    An entry point that cannot be loaded, or gives something else, is a warning and left out.

    Raises:
        ConfigError: Two have one name.
    """
    found = [*_own(), *_foreign()]
    for each in found:
        if sum(other.name == each.name for other in found) > 1:
            raise ConfigError("candidate", each.name, "two candidates have this name", "Uninstall or rename one")
    return tuple(sorted(found, key=lambda each: (each.turn, each.name)))


def candidate(name: str) -> Candidate:
    """The candidate of that name.

    Raises:
        ConfigError: There is none here, as when a plan was made with another version.
    """
    for each in candidates():
        if each.name == name:
            return each
    known = ", ".join(each.name for each in candidates())
    raise ConfigError("candidate", name, "is not known here", f"Make a new plan; known are {known}")


def admitted(each: Candidate, level: Iterable[str], supports: Supports) -> Decision:
    """Whether level, hardware and packages let a candidate be proposed at all.

    Args:
        each: The candidate.
        level: Levels that are allowed.
        supports: ``HardwareProfile.supports``.
    """
    if each.level not in level:
        return Rejected(each.name, f"needs level {each.level.value!r}")
    for feature in each.features:
        if not (verdict := supports(feature)):
            return Rejected(each.name, verdict.reason)
    for optional in each.packages:
        if not (verdict := optional.available()):
            return Rejected(each.name, verdict.reason)
    return Accepted(each.name, "admitted")


@functools.cache
def _own() -> tuple[Candidate, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [import_module(f"{package.__name__}.{name}") for name in names]
    return tuple(module.CANDIDATE for module in modules if hasattr(module, "CANDIDATE"))


def _foreign() -> list[Candidate]:
    found = []
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        each = _loaded(entry)
        if not isinstance(each, Rejected):
            found.append(each)
        else:
            warnings.warn(f"kpt: {each.reason}; it is left out. Repair or uninstall that package", stacklevel=3)
    return found


def _loaded(entry: metadata.EntryPoint) -> Candidate | Rejected:
    owner = "an installed package" if entry.dist is None else entry.dist.name
    title = f"entry point {entry.name!r} of {owner}"
    try:
        each = entry.load()
    except Exception as error:  # noqa: BLE001  code of others runs at their import, and may fail in any way
        return Rejected(entry.name, f"{title} cannot be loaded: {type(error).__name__}: {error}")
    # A class has the attributes of its objects.
    if isinstance(each, type) or not isinstance(each, Candidate):
        found = f"the class {each.__name__}" if isinstance(each, type) else type(each).__name__
        return Rejected(entry.name, f"{title} gives no candidate but {found}")
    return each
