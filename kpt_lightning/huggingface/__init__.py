"""Accelerate and the Hugging Face Trainer. Names are loaded when first used: Accelerate's import costs seconds."""

from importlib import import_module
from typing import TYPE_CHECKING

from kpt_lightning.optional import ACCELERATE, TRANSFORMERS

if TYPE_CHECKING:
    from kpt_lightning.huggingface.accelerator import KptAccelerator as KptAccelerator
    from kpt_lightning.huggingface.preparation import prepare as prepare
    from kpt_lightning.huggingface.session import Session as Session
    from kpt_lightning.huggingface.tracker import KptTracker as KptTracker
    from kpt_lightning.huggingface.tracking_callback import KptRunCallback as KptRunCallback
    from kpt_lightning.huggingface.trainer_callback import KptTrainerCallback as KptTrainerCallback

_HOME = {
    "KptAccelerator": "accelerator",
    "KptRunCallback": "tracking_callback",
    "KptTracker": "tracker",
    "KptTrainerCallback": "trainer_callback",
    "Session": "session",
    "prepare": "preparation",
}

_NEEDS = {
    "KptAccelerator": (ACCELERATE,),
    "KptRunCallback": (ACCELERATE, TRANSFORMERS),
    "KptTracker": (ACCELERATE,),
    "KptTrainerCallback": (ACCELERATE, TRANSFORMERS),
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name in _HOME:
        for package in _NEEDS.get(name, ()):
            package.require(name)
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
