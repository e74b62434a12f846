"""Proof that FP8 ran: calls counted against the layers converted, and kernel names from the profiler."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import VerificationError
from kpt_lightning.precision.float8_linear import ALIGNMENT, Float8Linear
from kpt_lightning.precision.gemm import GemmCounts
from kpt_lightning.precision.kernel_sizes import LEAST_ELEMENTS
from kpt_lightning.precision.recipes import ROLES

# cuBLASLt names the operands of its Hopper and Blackwell kernels by letter, as in nvjet_sm90_qrtst_128x160: q is e4m3
# and r is e5m2. CUTLASS and older kernels carry the type's name.
_KERNEL = re.compile(r"^nvjet_(sm\d+_)?[qr][qr]|e4m3|e5m2|fp8|float8")
# Casts and reductions name float8 too: those that torch.compile fuses, and torch's own.
_NOT_GEMM = re.compile(r"^triton_|^void at::native::")


def check_calls(counts: GemmCounts, layers: Sequence[nn.Linear]) -> list[Decision]:
    """Compare the FP8 GEMMs of the first optimizer step with the converted layers, size by size.

    Args:
        counts: What ran since the start of training.
        layers: The converted layers.

    Returns:
        What ran; and a rejection where a role has fewer GEMMs than layers, or where no backward pass ran, which may be
        right (a second optimizer, experts that had no token).

    Raises:
        VerificationError: Not one FP8 GEMM ran.
    """
    ran: Counter[tuple[int, int]] = Counter()
    learned: Counter[tuple[int, int]] = Counter()
    for (role, m, n, k), calls in counts.calls.items():
        if role == "output":
            ran[n, k] += calls
        elif role == "grad_weight":
            learned[m, n] += calls
    if not ran:
        raise VerificationError(
            f"{len(layers)} layers were converted to FP8, and not one FP8 GEMM ran in the first optimizer step. "
            "Something calls the weights past the modules' forward. Name the layers that run in float8.include, or set "
            "precision to 'bf16-mixed'"
        )
    kind = "emulated FP8 GEMMs" if counts.emulated else "FP8 GEMMs"
    text = ", ".join(f"{role} {counts.of_role(role)}" for role in ROLES)
    decisions: list[Decision] = [
        Accepted("fp8 calls", f"{counts.total} {kind} by the end of step 1 ({text}) from {len(layers)} layers")
    ]
    if _wants_backward(layers) and not counts.of_role("grad_input") + counts.of_role("grad_weight"):
        decisions.append(Rejected("fp8 calls", "no FP8 GEMM ran in a backward pass by the end of step 1"))
        return decisions
    trained = [layer for layer in layers if _trains_in_fp8(layer)]
    return decisions + (_too_few("output", layers, ran) or _too_few("grad_weight", trained, learned))


def check_merged(counts: GemmCounts, planned: bool) -> list[Decision]:
    """Whether products that were planned as one GEMM ran as one.

    Args:
        counts: Of the first step.
        planned: Whether any were.
    """
    if not planned:
        return []
    if counts.merged:
        return [Accepted("merged GEMMs", f"{counts.merged} FP8 products ran inside of another's GEMM")]
    reason = f"none: no input has {LEAST_ELEMENTS:,} elements, below which FP8 layers run one by one"
    return [Rejected("merged GEMMs", reason)]


def _too_few(role: str, layers: Sequence[nn.Linear], ran: Counter[tuple[int, int]]) -> list[Decision]:
    """Sizes, as (rows, columns) of the weight, with fewer GEMMs than layers."""
    planned = Counter((_up(layer.out_features), _up(layer.in_features)) for layer in layers)
    short = [
        f"{ran[n, k]} {role} GEMMs for {count} FP8 layers of size {k} -> {n}"
        for (n, k), count in sorted(planned.items())
        if ran[n, k] < count
    ]
    return [Rejected("fp8 calls", f"{', '.join(short)} by the end of step 1")] if short else []


def check_gradients(layers: Sequence[nn.Linear]) -> list[Decision]:
    """Look for converted layers whose weight gradient is exactly zero after a backward pass.

    A gradient that a compiler lost on its way looks so; that of a layer behind a weight that starts at zero too.
    Reads one number for each layer; waits for the device once.

    Args:
        layers: The converted layers.

    Returns:
        Nothing where no gradient is there to look at, such as after ``zero_grad``.
    """
    found = [layer.weight.grad for layer in layers if layer.weight.requires_grad]
    gradients = [local for gradient in found if gradient is not None and (local := _local(gradient)).numel()]
    if not gradients:
        return []
    if lost := sum(gradient is None for gradient in found):
        return [Rejected("fp8 gradients", f"{lost} of {len(found)} FP8 layers have no weight gradient after step 1")]
    if dead := int((torch.stack([gradient.abs().amax().float() for gradient in gradients]) == 0).sum()):
        reason = f"{dead} of {len(gradients)} FP8 layers have a weight gradient of zeros after step 1"
        return [Rejected("fp8 gradients", f"{reason}; right only behind a weight that starts at zero")]
    return [Accepted("fp8 gradients", f"{len(gradients)} FP8 layers have a weight gradient that is not zero")]


def fp8_kernels(names: Iterable[str]) -> list[str]:
    """Those of the CUDA kernel names that are FP8 GEMMs."""
    return [name for name in names if _KERNEL.search(name.lower()) and not _NOT_GEMM.search(name.lower())]


def check_kernels(names: Sequence[str], expected: int) -> Decision:
    """Compare the CUDA kernels of one profiled step with the FP8 GEMM calls of that step.

    Args:
        names: One entry for each kernel launch.
        expected: FP8 GEMM calls that Python counted in the same step.

    Returns:
        Accepted, or Rejected where some calls launched no FP8 kernel.

    Raises:
        VerificationError: No FP8 kernel was launched.
    """
    found = fp8_kernels(names)
    if not found:
        raise VerificationError(
            f"{expected} FP8 GEMMs were called in the profiled step and no FP8 kernel was among its {len(names)} CUDA "
            "kernels. Set precision to 'bf16-mixed' and report the GPU and CUDA version"
        )
    if len(found) < expected:
        reason = f"{len(found)} FP8 GEMM kernels for {expected} calls in the profiled step, such as {found[0]}"
        return Rejected("fp8 kernels", reason)
    return Accepted("fp8 kernels", f"{len(found)} FP8 GEMM kernels in the profiled step, such as {found[0]}")


def _wants_backward(layers: Sequence[nn.Linear]) -> bool:
    """Whether some FP8 GEMM belongs to the backward pass; the input of a first layer needs none."""
    trainable = [layer for layer in layers if layer.weight.requires_grad]
    return any(_trains_in_fp8(layer) for layer in trainable) or len(trainable) > 1


def _trains_in_fp8(layer: nn.Linear) -> bool:
    return isinstance(layer, Float8Linear) and layer.weight.requires_grad and layer.float8.recipe.grad_weight_fp8


def _up(size: int) -> int:
    return size + -size % ALIGNMENT


def _local(gradient: Tensor) -> Tensor:
    """The shard of this rank."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
