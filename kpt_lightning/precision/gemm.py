"""The FP8 GEMM as one custom operator, which torch.compile calls as it is, so that every call can be counted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class GemmCounts:
    """FP8 GEMMs that ran.

    Attributes:
        calls: (role, M, N, K) -> number of products of one layer; M, N, K are their sizes (K contracted).
        emulated: How many of them ran in fp32 arithmetic.
        merged: How many of them ran inside of the GEMM of another layer.
    """

    calls: Counter[tuple[str, int, int, int]] = field(default_factory=Counter)
    emulated: int = 0
    merged: int = 0

    @property
    def total(self) -> int:
        """Products of all layers."""
        return self.calls.total()

    @property
    def launched(self) -> int:
        """GEMMs that were called: one for all layers whose products are merged."""
        return self.total - self.merged

    def clear(self) -> None:
        """Start anew."""
        self.calls.clear()
        self.emulated = self.merged = 0

    def of_role(self, role: str) -> int:
        """Products of one role: output, grad_input or grad_weight."""
        return sum(count for (name, *_), count in self.calls.items() if name == role)

    def add(self, role: str, sizes: tuple[int, int, int], parts: Sequence[int], emulated: bool) -> None:
        """Count one GEMM of (M, N, K); ``parts`` are the rows of the weights that lie side by side in it."""
        axis = {"output": 1, "grad_input": 2, "grad_weight": 0}[role]
        for part in parts or (sizes[axis],):
            m, n, k = (part if number == axis else size for number, size in enumerate(sizes))
            self.calls[role, m, n, k] += 1
            self.emulated += emulated
        self.merged += max(0, len(parts) - 1)


_active: list[GemmCounts] = []


@contextmanager
def count_gemms() -> Iterator[GemmCounts]:
    """Count every FP8 GEMM of this process, in any thread, until the block ends."""
    counts = GemmCounts()
    _active.append(counts)
    try:
        yield counts
    finally:
        _active[:] = [other for other in _active if other is not counts]


def _run(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
    role: str,
    parts: Sequence[int] = (),
) -> Tensor:
    for counts in _active:
        counts.add(role, (a.shape[0], b.shape[1], a.shape[1]), parts, emulate)
    # Autocast reaches the inside of an operator, and on a CPU both ways of multiplying would run in bf16.
    with nullcontext() if a.is_cuda and not emulate else torch.autocast(a.device.type, enabled=False):
        # Rowwise kernels write bf16 only; tensorwise ones also fp32, which spares the weight gradient a pass.
        written = out_dtype if scale_a.numel() == 1 else torch.bfloat16
        if emulate:
            # FP8 values are exact in TF32, scaled ones are not: the scales come after the product, as in the kernels.
            return ((a.float() @ b.float()) * scale_a * scale_b).to(written).to(out_dtype)
        return torch._scaled_mm(
            a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=written, use_fast_accum=fast_accum
        ).to(out_dtype)  # fmt: skip


def _shape(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
    role: str,
    parts: Sequence[int] = (),
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


# A plain Library instead of torch.library.custom_op, whose Python wrapper would run around every call. The GEMM wants b
# column-major, hence exact strides.
_library: Any = torch.library.Library("kpt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "float8_gemm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType out_dtype, bool fast_accum, "
    "bool emulate, str role, int[] parts=[]) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)
for _key in ("CPU", "CUDA"):
    _library.impl("float8_gemm", _run, _key)
torch.library.register_fake("kpt::float8_gemm", _shape, lib=_library)


def float8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
    role: str,
    parts: Sequence[int] = (),
) -> Tensor:
    """``(a * scale_a) @ (b * scale_b)``.

    Args:
        a: (M, K), FP8, row-major.
        b: (K, N), FP8, column-major.
        scale_a: fp32 scalar, or (M, 1).
        scale_b: fp32 scalar, or (1, N); of the kind of ``scale_a``.
        out_dtype: dtype of the result. A rowwise product is rounded to bf16 first, which is all its kernels write.
        fast_accum: Accumulate in the tensor core's own precision; for the output GEMM.
        emulate: Multiply in fp32 instead of ``torch._scaled_mm``.
        role: output, grad_input or grad_weight; for the count.
        parts: Rows of the weights whose products are merged in this one, side by side; for the count.

    Returns:
        (M, N) in ``out_dtype``.
    """
    result: Tensor = torch.ops.kpt.float8_gemm(a, b, scale_a, scale_b, out_dtype, fast_accum, emulate, role, parts)
    return result
