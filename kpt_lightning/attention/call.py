"""One call of an attention kernel: what it was given, which kernel took it, and how much of its work was of use."""

import math
from dataclasses import dataclass

SKIPS_MASKED_HALF = frozenset({"cudnn", "flash", "efficient", "overrideable", "fa3", "fa4", "package"})
"""Kernels that leave out the masked half of causal attention; math computes every score and then masks."""

TITLES = {
    "cudnn": "cuDNN", "flash": "flash", "efficient": "memory-efficient", "math": "math (scores in memory)",
    "overrideable": "the device's own kernel", "fa3": "FlashAttention 3", "fa4": "FlashAttention 4",
    "package": "a flash attention package", "flex": "flex",
}  # fmt: skip
"""Backend to its name for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One forward call.

    Attributes:
        backend: A key of :data:`TITLES`.
        query: (batch, heads, queries, head size), or without batch.
        key: (batch, key heads, keys, head size), likewise.
        value_size: Head size of the values.
        dtype: Of the query, such as "bfloat16".
        causal: Whether the kernel was told so by its flag; None where it was not seen.
        mask: Shape of the mask or bias tensor that it was given; None without one.
        dropout: Probability.
    """

    backend: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    value_size: int
    dtype: str
    causal: bool | None
    mask: tuple[int, ...] | None = None
    dropout: float = 0.0

    @property
    def heads(self) -> tuple[int, int]:
        """Heads of queries and of keys; they differ in grouped-query attention."""
        return (self.query[-3], self.key[-3]) if len(self.query) > 2 else (1, 1)

    @property
    def all_pairs_flops(self) -> float:
        """FLOPs of the forward pass over all pairs of query and key: ``2 B H Sq Sk (D + Dv)``."""
        return 2.0 * math.prod(self.query[:-1]) * self.key[-2] * (self.query[-1] + self.value_size)

    @property
    def computed_flops(self) -> float:
        """FLOPs that the forward kernel executed: half of all pairs where it was told that attention is causal."""
        return self.all_pairs_flops * (0.5 if self.causal and self.backend in SKIPS_MASKED_HALF else 1.0)

    def useful_flops(self, causal: bool | None = None) -> float:
        """FLOPs that the result needs: half of all pairs in causal attention.

        Args:
            causal: What is known of the model, for a call whose mask tensor hides it; None asks the call's own flag.
        """
        return self.all_pairs_flops * (0.5 if (self.causal if causal is None else causal) else 1.0)

    def __str__(self) -> str:
        kind = {True: "causal", False: "not causal", None: "causality not seen"}[self.causal]
        mask = "no mask tensor" if self.mask is None else f"mask tensor {'x'.join(map(str, self.mask))}"
        parts = [TITLES[self.backend], kind, mask, f"{'x'.join(map(str, self.query))} {self.dtype}"]
        if self.heads[0] != self.heads[1]:
            parts.append(f"{self.heads[1]} key heads")
        if self.query[-2:-1] != self.key[-2:-1]:
            parts.append(f"{self.key[-2]} keys")
        if self.dropout:
            parts.append(f"dropout {self.dropout:g}")
        return ", ".join(parts)
