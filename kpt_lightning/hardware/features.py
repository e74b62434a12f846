"""What a device can do, decided from its profile alone, each time with the reason."""

from collections.abc import Callable, Mapping, Sequence

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware.device import DeviceProfile

Versions = Mapping[str, str]
Rule = Callable[[str, DeviceProfile, Versions], Decision]

# Instruction sets that multiply bfloat16 without going through float32.
_CPU_BF16 = ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16", "svebf16")


def _from_capability(least: tuple[int, int], has: str, lacks: str, cpu: str) -> Rule:
    """A rule that NVIDIA GPUs meet from one compute capability on, and CPUs never.

    Args:
        least: Lowest compute capability that meets it.
        has: What is true of a GPU that meets it, to follow the GPU's name.
        lacks: What is true of an older one, and what is needed.
        cpu: Why a CPU is rejected, a clause.
    """

    def rule(feature: str, device: DeviceProfile, versions: Versions) -> Decision:
        if device.kind == "cpu":
            return Rejected(feature, f"{device.title}: {cpu}")
        if device.capability is None:
            return _unknown(feature, device)
        if device.capability < least:
            return Rejected(feature, f"{device.title} {lacks}")
        return Accepted(feature, f"{device.title} {has}")

    return rule


def _unknown(feature: str, device: DeviceProfile) -> Rejected:
    return Rejected(feature, f"{device.title}: no rule for {device.vendor} devices of kind {device.kind!r} yet")


def _bf16(feature: str, device: DeviceProfile, versions: Versions) -> Decision:
    if device.kind != "cpu":
        return _BF16_CUDA(feature, device, versions)
    found = [name for name in _CPU_BF16 if name in device.isa]
    if found:
        return Accepted(feature, f"{device.title} has {found[0]}")
    return Rejected(feature, f"{device.title} has none of {', '.join(_CPU_BF16[:2])}: bfloat16 runs, but emulated")


def _compile(feature: str, device: DeviceProfile, versions: Versions) -> Decision:
    if device.kind == "cpu":
        if "cxx" in versions:
            return Accepted(feature, f"C++ compiler {versions['cxx']} found")
        return Rejected(feature, "torch.compile on a CPU needs a C++ compiler on PATH; install g++ or set CXX")
    if device.vendor != "nvidia" or device.capability is None:
        return _unknown(feature, device)
    if "triton" not in versions:
        return Rejected(feature, "torch.compile on a GPU needs triton; pip install 'kpt-lightning[gpu]'")
    if "cc" not in versions:
        return Rejected(feature, "triton builds its launcher with a C compiler, none on PATH; install gcc or set CC")
    return Accepted(feature, f"triton {versions['triton']} and C compiler {versions['cc']} found")


def _flash_attention(feature: str, device: DeviceProfile, versions: Versions) -> Decision:
    if device.kind == "cpu":
        return Accepted(feature, "torch has a flash attention kernel for CPUs")
    return _FLASH_CUDA(feature, device, versions)


_BF16_CUDA = _from_capability((8, 0), "has bfloat16 units", "has no bfloat16 unit; bfloat16 needs Ampere or newer", "")
# https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
_FLASH_CUDA = _from_capability(
    (8, 0), "has flash attention in torch", "has no flash attention in torch; it needs Ampere or newer", ""
)
_FP8 = "FP8 needs Ada, Hopper or newer"

_RULES: dict[str, Rule] = {
    "bf16": _bf16,
    # torch._scaled_mm: https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cuda/ScaledBlas.cpp
    "fp8_tensorwise": _from_capability((8, 9), "has FP8 units", f"has no FP8 unit; {_FP8}", f"no FP8 unit; {_FP8}"),
    "fp8_rowwise": _from_capability(
        (9, 0), "has FP8 units", "is not offered rowwise FP8; it needs Hopper or newer", f"no FP8 unit; {_FP8}"
    ),
    "mxfp8": _from_capability((10, 0), "has MXFP8 units", "has no MXFP8 unit; MXFP8 needs Blackwell", "no MXFP8 unit"),
    "nvfp4": _from_capability((10, 0), "has NVFP4 units", "has no NVFP4 unit; NVFP4 needs Blackwell", "no NVFP4 unit"),
    "compile": _compile,
    "flash_attention": _flash_attention,
    "tf32": _from_capability(
        (8, 0), "has TF32 units", "has no TF32 unit; TF32 needs Ampere or newer", "TF32 is a format of GPUs"
    ),
}

NAMES = tuple(_RULES)


def decide(feature: str, devices: Sequence[DeviceProfile], versions: Versions) -> Decision:
    """Whether all devices can do ``feature``; the weakest decides.

    Raises:
        ConfigError: The feature is none of :data:`NAMES`.
    """
    if feature not in _RULES:
        raise ConfigError("feature", feature, f"must be one of {', '.join(NAMES)}", "Use one of these names")
    weakest_first = sorted(devices, key=lambda device: device.capability or (0, 0))
    decisions = [_RULES[feature](feature, device, versions) for device in weakest_first]
    decision = next((entry for entry in decisions if not entry), decisions[0])
    if len({device.model for device in devices}) == 1:
        return decision
    others = f"; the weakest of {len(devices)} unlike devices decides"
    return type(decision)(decision.subject, decision.reason + others)
