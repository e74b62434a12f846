"""Proof that FP8 ran: calls counted against the layers converted, and kernel names from the profiler."""

from collections.abc import Iterable, Sequence

from torch import nn

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import VerificationError
from kpt_lightning.precision.float8_linear import ALIGNMENT
from kpt_lightning.precision.gemm import GemmCounts
from kpt_lightning.precision.recipes import ROLES

# cuBLASLt names its Hopper and Blackwell FP8 kernels nvjet_*qq*; older and CUTLASS ones carry the type's name.
_KERNEL_MARKS = ("nvjet_qq", "nvjet_sm90_qq", "nvjet_sm100_qq", "e4m3", "e5m2", "fp8", "float8")
_NOT_GEMM = ("triton_",)


def check_calls(counts: GemmCounts, layers: Sequence[nn.Linear]) -> list[Decision]:
    """Compare the FP8 GEMMs of the first optimizer step with the converted layers.

    Args:
        counts: What ran since the start of training.
        layers: The converted layers.

    Returns:
        What ran; and a rejection where layers of some size did not run, which may be right (a second optimizer, say).

    Raises:
        VerificationError: Not one FP8 GEMM ran.
    """
    planned = {(_up(layer.out_features), _up(layer.in_features)) for layer in layers}
    ran = {(n, k) for (role, _, n, k) in counts.calls if role == "output"}
    if not ran:
        raise VerificationError(
            f"{len(layers)} layers were converted to FP8, and not one FP8 GEMM ran in the first optimizer step. "
            "Something calls the weights past the modules' forward. Name the layers that run in float8.include, or set "
            "precision to 'bf16-mixed'"
        )
    kind = "emulated FP8 GEMMs" if counts.emulated else "FP8 GEMMs"
    text = ", ".join(f"{role} {counts.of_role(role)}" for role in ROLES)
    decisions: list[Decision] = [
        Accepted("fp8 calls", f"{counts.total} {kind} in step 1 ({text}) from {len(layers)} layers")
    ]
    missing = sorted(planned - ran)
    if missing:
        sizes = ", ".join(f"{k} -> {n}" for n, k in missing)
        decisions.append(Rejected("fp8 calls", f"FP8 layers of size {sizes} ran no FP8 GEMM in step 1"))
    return decisions


def fp8_kernels(names: Iterable[str]) -> list[str]:
    """Those of the CUDA kernel names that are FP8 GEMMs."""
    lowered = ((name, name.lower()) for name in names)
    return [
        name for name, low in lowered if any(mark in low for mark in _KERNEL_MARKS) and not low.startswith(_NOT_GEMM)
    ]


def check_kernels(names: Sequence[str], expected: int) -> Decision:
    """Compare the CUDA kernels of one profiled step with the FP8 GEMM calls of that step.

    Args:
        names: One entry for each kernel launch.
        expected: FP8 GEMM calls that Python counted in the same step.

    Raises:
        VerificationError: No FP8 kernel was launched.
    """
    found = fp8_kernels(names)
    if not found:
        raise VerificationError(
            f"{expected} FP8 GEMMs were called in the profiled step and no FP8 kernel was among its {len(names)} CUDA "
            "kernels. Set precision to 'bf16-mixed' and report the GPU and CUDA version"
        )
    return Accepted("fp8 kernels", f"{len(found)} FP8 GEMM kernels in the profiled step, such as {found[0][:60]}")


def _up(size: int) -> int:
    return size + -size % ALIGNMENT
