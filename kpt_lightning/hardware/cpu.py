"""Facts about the CPU, from psutil, /proc and the process's own limits."""

import os
import platform
from pathlib import Path

import psutil

from kpt_lightning.hardware.device import DeviceProfile

# Names as Linux prints them in /proc/cpuinfo, x86 first, then Arm.
ISA = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_ne_convert", "avx_vnni",
    "amx_tile", "amx_bf16", "amx_int8", "amx_fp16",
    "asimd", "bf16", "i8mm", "sve", "sve2", "svebf16",
)  # fmt: skip

_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}


def detect_cpu() -> DeviceProfile:
    """The CPU as a device: name, generation, usable cores, instruction sets and memory."""
    facts = parse_cpuinfo(_read("/proc/cpuinfo"))
    machine = platform.machine()
    return DeviceProfile(
        kind="cpu",
        vendor=_VENDORS.get(facts.get("vendor_id", ""), _vendor(machine)),
        name=facts.get("model name") or platform.processor() or machine,
        architecture=machine,
        memory_bytes=usable_memory(psutil.virtual_memory().total, _read("/sys/fs/cgroup/memory.max")),
        cores=usable_cores(),
        isa=isa_of(facts),
    )


def parse_cpuinfo(text: str) -> dict[str, str]:
    """The entries of the first processor in the text of /proc/cpuinfo."""
    first, _, _ = text.partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def isa_of(facts: dict[str, str]) -> tuple[str, ...]:
    """The instruction sets of :data:`ISA` among the flags, in that order."""
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return tuple(name for name in ISA if name in flags)


def usable_cores() -> int:
    """Logical cores that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory(total: int, cgroup_limit: str) -> int:
    """Bytes of memory of the host, or of the container where that is less.

    Args:
        total: Memory of the host in bytes.
        cgroup_limit: Text of the control group's ``memory.max``: a number, "max" or nothing.
    """
    limit = cgroup_limit.strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _vendor(machine: str) -> str:
    if machine not in {"arm64", "aarch64"}:
        return "unknown"
    return "apple" if platform.system() == "Darwin" else "arm"


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
