"""History of training runs: record, store, compare, find changes. Names are loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kpt_lightning.tracking.change_points import Change as Change
    from kpt_lightning.tracking.change_points import detect_changes as detect_changes
    from kpt_lightning.tracking.gate import Verdict as Verdict
    from kpt_lightning.tracking.gate import compare as compare
    from kpt_lightning.tracking.recorder import RunInfo as RunInfo
    from kpt_lightning.tracking.recorder import RunRecorder as RunRecorder
    from kpt_lightning.tracking.store import RunStore as RunStore

_HOME = {
    "Change": "change_points",
    "RunInfo": "recorder",
    "RunRecorder": "recorder",
    "RunStore": "store",
    "Verdict": "gate",
    "compare": "gate",
    "detect_changes": "change_points",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
