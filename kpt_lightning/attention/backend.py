"""Trying attention backends on calls like those of a model: which can take one, and how long it takes alone."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kpt_lightning.attention.call import AttentionCall
from kpt_lightning.attention.flash_package import activated
from kpt_lightning.decision import Rejected
from kpt_lightning.measure.interleave import Gain, State, measure_gain
from kpt_lightning.validation.attempt import Failure, attempt

SDP = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Backends that can be chosen, by the names of :data:`~kpt_lightning.attention.call.TITLES`."""

_LARGEST_SCORES = 2**30
"""Bytes of scores that math may hold in a trial on a CPU, where running out of memory ends the process."""

_ROUNDS = 6
"""The least with an interval of 95 %, whose lower end is then the worst of them."""


@contextmanager
def preferring(backend: str) -> Iterator[None]:
    """A context in which ``backend`` is taken first; calls that it cannot take fall through to the user's others.

    Code that is compiled in it is kept apart from other code in torch's cache, which asks for the graph alone and
    would hand out a graph with the choice of another time.
    """
    order = _order(backend)
    # A CPU ignores the order: there math has to be the only one, and it takes every call.
    kernels = sdpa_kernel(order[:1]) if backend == "math" else sdpa_kernel(order, set_priority=True)
    compiler: Any = torch.compiler.config
    tag = f"{compiler.cache_key_tag} attention={backend}"
    with kernels, compiler.patch(cache_key_tag=tag):
        yield


def _order(backend: str) -> list[SDPBackend]:
    switches: Any = torch.backends.cuda
    allowed = {
        SDPBackend.CUDNN_ATTENTION: switches.cudnn_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: switches.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: switches.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: switches.math_sdp_enabled(),
    }
    first = SDP[backend]
    return [first, *(each for each, enabled in allowed.items() if enabled and each is not first)]


def try_backend(call: AttentionCall, backend: str, now: State, device: torch.device) -> Gain | Rejected:
    """Time one call, forward and backward, as it runs now and on ``backend`` alone, on random input.

    Args:
        call: Its sizes, dtype and flags.
        backend: A key of :data:`SDP`.
        now: Puts the present choice into force.
        device: Where to run.

    Returns:
        The gain of the kernel alone, or Rejected with torch's own reasons where the backend cannot take the call.
    """
    if backend == "math" and (reason := _too_large(call)):
        return Rejected(backend, reason)
    run = _runner(call, device)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        # A package of others may raise anything, from its import on.
        result = attempt(lambda: _measure(run, backend, now, device))
    if isinstance(result, Failure):
        # torch warns once for each rule that the call breaks, then raises.
        reasons = [str(each.message).partition(" (Triggered")[0] for each in told]
        return Rejected(backend, "; ".join(_telling(reasons)) or result.text)
    return result.value


def _measure(run: Callable[[], None], backend: str, now: State, device: torch.device) -> Gain:
    with _only(backend):
        run()
    return measure_gain(now, lambda: _only(backend), run, device=device, rounds=_ROUNDS)


@contextmanager
def _only(backend: str) -> Iterator[None]:
    with activated(backend), sdpa_kernel([SDP[backend]]):
        yield


def _telling(reasons: list[str]) -> list[str]:
    """Without the announcements of which backend is spoken of, and what was switched off here on purpose."""
    noise = ("kernel not used because", "has been runtime disabled", "was not enabled", "disabled by")
    return [" ".join(each.split()) for each in reasons if not any(word in each for word in noise)]


def _runner(call: AttentionCall, device: torch.device) -> Callable[[], None]:
    dtype = getattr(torch, call.dtype)
    query, key = (_heads_of(shape, dtype, device) for shape in (call.query, call.key))
    value = _heads_of((*call.key[:-1], call.value_size), dtype, device)
    mask = None if call.mask is None else torch.zeros(call.mask, dtype=dtype, device=device)
    grouped = call.heads[0] != call.heads[1]
    cotangent = torch.randn((*call.query[:-1], call.value_size), dtype=dtype, device=device)

    def run() -> None:
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=call.dropout, is_causal=bool(call.causal), enable_gqa=grouped
        )
        torch.autograd.grad(out, (query, key, value), cotangent)

    return run


def _heads_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random, laid out as models have it: (batch, sequence, heads, size) in memory."""
    if len(shape) < 4:
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    batch, heads, length, size = shape
    rows = torch.randn(batch, length, heads, size, dtype=dtype, device=device)
    return rows.transpose(1, 2).requires_grad_()


def _too_large(call: AttentionCall) -> str | None:
    scores = 4.0 * call.all_pairs_flops / 2 / (call.query[-1] + call.value_size)
    return f"its scores would take {scores / 2**30:.1f} GiB" if scores > _LARGEST_SCORES else None
