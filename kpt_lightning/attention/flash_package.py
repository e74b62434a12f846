"""Newer flash attention kernels of other packages, put behind torch's own flash operator."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module, util
from typing import Any

import torch

from kpt_lightning.attention import flash_attn_4
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.optional import FLASH_ATTN_4

# torch's registry by its name there; FlashAttention 4 goes in under a name of ours, with functions of ours.
IMPLEMENTATIONS = {"fa3": "FA3", "fa4": "KPT_FA4"}
"""Backend to the name under which torch knows the implementation."""


def available(backend: str) -> Decision:
    """Whether torch can put the package behind its flash operator. Nothing is imported."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return Rejected(backend, f"torch {torch.__version__} cannot exchange its flash kernel; 2.11 can")
    if backend == "fa4":
        return FLASH_ATTN_4.available()
    if util.find_spec("flash_attn_interface") is None:
        return Rejected(backend, "flash_attn_interface, the package of FlashAttention 3, is not installed")
    return Accepted(backend, "flash_attn_interface is installed")


def running() -> str | None:
    """The backend that is in force instead of torch's own flash kernel, None where that is."""
    current = _current()
    names = {"FA3": "fa3", "FA4": "fa4", "KPT_FA4": "fa4"}
    return None if current is None else names.get(current, "package")


def activate(backend: str) -> str | None:
    """Put it into force for the whole process.

    Returns:
        What was in force before, for :func:`restore`.
    """
    before = _current()
    with ExitStack() as undo, warnings.catch_warnings():
        # That an operator is taken over is what is wanted; what the package says of its own imports is not ours.
        warnings.simplefilter("ignore")
        undo.callback(restore, before)
        if backend == "fa4":
            _register_fa4()
        _attention().activate_flash_attention_impl(IMPLEMENTATIONS[backend])
        undo.pop_all()
    return before


def restore(before: str | None) -> None:
    """Undo :func:`activate`."""
    if before is not None:
        _attention().activate_flash_attention_impl(before)
    elif _current() is not None:
        _attention().restore_flash_attention_impl()


@contextmanager
def activated(backend: str) -> Iterator[None]:
    """As :func:`activate`, for a while; nothing for torch's own backends."""
    if backend not in IMPLEMENTATIONS:
        yield
        return
    before = activate(backend)
    try:
        yield
    finally:
        restore(before)


def _attention() -> Any:
    return torch.nn.attention


def _current() -> str | None:
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


def _register_fa4() -> None:
    from torch.nn.attention import _fa4

    import_module(f"{FLASH_ATTN_4.module}.interface")
    enter = partial(_fa4.register_flash_attention_fa4, module_path=flash_attn_4.__name__)
    _attention().register_flash_attention_impl(IMPLEMENTATIONS["fa4"], register_fn=enter)
