"""Newer flash attention kernels of other packages, put behind torch's own flash operator."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from typing import Any

import torch

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.optional import FLASH_ATTN_4

IMPLEMENTATIONS = {"fa3": "FA3", "fa4": "FA4"}
"""Our name to torch's."""


def available(backend: str) -> Decision:
    """Whether torch can put the package behind its flash operator. Nothing is imported."""
    attention: Any = torch.nn.attention
    known: list[str] = (
        attention.list_flash_attention_impls() if hasattr(attention, "list_flash_attention_impls") else []
    )
    if IMPLEMENTATIONS[backend] not in known:
        return Rejected(backend, f"torch {torch.__version__} knows no {IMPLEMENTATIONS[backend]}")
    if backend == "fa4":
        return FLASH_ATTN_4.available()
    if util.find_spec("flash_attn_interface") is None:
        return Rejected(backend, "flash_attn_interface, the package of FlashAttention 3, is not installed")
    return Accepted(backend, "flash_attn_interface is installed")


def activate(backend: str) -> str | None:
    """Put it into force for the whole process.

    Returns:
        What was in force before, for :func:`restore`.
    """
    attention: Any = torch.nn.attention
    before: str | None = attention.current_flash_attention_impl()
    attention.activate_flash_attention_impl(IMPLEMENTATIONS[backend])
    return before


def restore(before: str | None) -> None:
    """Undo :func:`activate`."""
    attention: Any = torch.nn.attention
    if before is None:
        attention.restore_flash_attention_impl()
    else:
        attention.activate_flash_attention_impl(before)


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
