"""What attention really did in one run: read from the operators that ran, in eager and in compiled code alike.

The choice of a kernel is made inside torch, and compiled code made it while it was traced. So nothing is patched or
asked beforehand: the profiler lists the operators of a run with their sizes and flags. A dispatch mode would not do,
for compiled functions run uncompiled under one.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_lightning.attention.call import AttentionCall
from kpt_lightning.attention.flash_package import running
from kpt_lightning.errors import KptError

# Operators of aten that carry out scaled_dot_product_attention, forward:
# https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/native_functions.yaml
_BACKENDS = {
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_fused_attention_overrideable": "overrideable",
    "aten::_scaled_dot_product_attention_math": "math",
}
# Operators and autograd functions of the flash-attn packages (FlashAttnFunc, flash_attn::_flash_attn_forward), and the
# kernel that the compiler makes of flex attention. A replaced backward carries the forward's name with a suffix.
_PACKAGE, _FLEX, _BACKWARD = (
    re.compile(r"flash_?attn", re.I),
    re.compile(r"flex_attention"),
    re.compile(r"bwd|backward", re.I),
)
# What happens under these is no forward call: the compiler's dry runs, and recomputation in a backward pass.
_TRACING, _IN_BACKWARD = "(dynamo_timed)", "autograd::engine::evaluate_function"
_DTYPES = {"float": "float32", "double": "float64", "c10::BFloat16": "bfloat16", "c10::Half": "float16"}


def observe_attention(run: Callable[[], Any]) -> list[AttentionCall]:
    """Run once and list the attention calls of its forward passes; recomputation for a backward pass is left out.

    Attention written out in matrix products is not seen, nor the math backend inside compiled code, which is traced
    into such products, nor anything in a replayed CUDA graph.

    Args:
        run: Does a forward pass, and a backward pass if it likes.

    Raises:
        KptError: Another profiler is running; torch has room for one.
    """
    if torch._C._autograd._profiler_enabled():
        raise KptError("observe_attention: another profiler is running, torch has room for one. Stop it first")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        run()
    results = profiler.profiler.kineto_results
    return [call for event in _forward_calls(results.events()) if (call := _read(event)) is not None]


def _forward_calls(events: Any) -> Iterator[Any]:
    """Attention events in order of time that lie in no other one, in no dry run and in no backward pass."""
    open_by_thread: dict[int, list[tuple[int, str, bool]]] = {}
    for event in sorted(events, key=lambda each: (each.start_ns(), -each.duration_ns())):
        start, name = event.start_ns(), event.name()
        stack = open_by_thread.setdefault(event.start_thread_id(), [])
        while stack and stack[-1][0] <= start:
            stack.pop()
        outside = not stack or stack[-1][2]
        wanted = _backend(name) is not None
        if wanted and outside:
            yield event
        passes = outside and not wanted and not name.endswith(_TRACING) and not name.startswith(_IN_BACKWARD)
        stack.append((start + event.duration_ns(), name, passes))


def _backend(name: str) -> str | None:
    if name in _BACKENDS:
        return _BACKENDS[name]
    if name.startswith("aten::") or _BACKWARD.search(name):
        return None
    if _PACKAGE.search(name):
        return "package"
    return "flex" if _FLEX.search(name) else None


def _read(event: Any) -> AttentionCall | None:
    name, shapes = event.name(), [tuple(shape) for shape in event.shapes()]
    backend = _backend(name)
    assert backend is not None, "asked before"
    if len(shapes) < 3 or not all(len(shape) >= 2 for shape in shapes[:3]):
        return None
    dtype = event.dtypes()[0]
    query, key, value = shapes[:3]
    given = _arguments(name, shapes, event.concrete_inputs())
    if backend in ("package", "flex"):
        # Packages lay out (batch, sequence, heads, size).
        turn = backend == "package"
        return AttentionCall(
            backend=backend, query=_heads_first(query) if turn else query, key=_heads_first(key) if turn else key,
            value_size=value[-1], dtype=_DTYPES.get(dtype, dtype), causal=given.get("causal"),
        )  # fmt: skip
    return AttentionCall(
        backend=_implementation(name, backend), query=query, key=key, value_size=value[-1],
        dtype=_DTYPES.get(dtype, dtype), causal=bool(given["is_causal"]),
        mask=given.get("attn_mask") or given.get("attn_bias") or None, dropout=float(given["dropout_p"]),
    )  # fmt: skip


def _arguments(name: str, shapes: list[tuple[int, ...]], values: list[Any]) -> dict[str, Any]:
    """The operator's arguments by name: a shape for a tensor, the value for anything else."""
    space, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, space, None), operator, None) if operator else None
    if packet is None or not hasattr(packet, "default"):
        return {}
    names = [argument.name for argument in packet.default._schema.arguments]
    return {each: shape or value for each, shape, value in zip(names, shapes, values, strict=False)}


def _heads_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-3], shape[-2], shape[-3], shape[-1]) if len(shape) > 2 else shape


def _implementation(name: str, backend: str) -> str:
    """The flash operator of torch may have been given to another library's kernel."""
    if name != "aten::_scaled_dot_product_flash_attention":
        return backend
    return running() or backend
