"""The one detector: asks the machine once and returns a frozen profile.

CUDA is not started where that can be avoided, see :mod:`kpt_lightning.hardware.nvidia`. CUDA_VISIBLE_DEVICES is
respected. AMD, Intel and Apple GPUs and TPUs are not detected yet: the profile is then the CPU's and a note says so.
"""

import os
import platform
import shutil
import sys
from typing import Any

from kpt_lightning.hardware import nvml
from kpt_lightning.hardware.cpu import detect_cpu
from kpt_lightning.hardware.device import DeviceProfile
from kpt_lightning.hardware.nvidia import detect_nvidia
from kpt_lightning.hardware.profile import HardwareProfile, Link
from kpt_lightning.optional import TRITON, installed_version

_DISTRIBUTIONS = ("lightning", "accelerate", "transformers", "peft", "torchao", "transformer-engine", "torch-xla")


def detect() -> HardwareProfile:
    """What this machine is, as far as this process may use it.

    Returns:
        The visible accelerators, the host, the versions found and notes on what could not be used.
    """
    facts = nvml.read()
    gpus, note = detect_nvidia(facts, os.environ)
    host = detect_cpu()
    notes = tuple(entry for entry in (note, _other_accelerator()) if entry)
    links = _links(gpus, facts) if facts else ()
    return HardwareProfile(devices=gpus or (host,), host=host, versions=_versions(facts), links=links, notes=notes)


def _versions(facts: nvml.Facts | None) -> dict[str, str]:
    """Versions of what is present; nothing but torch is imported."""
    import torch

    found: dict[str, str | None] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": _cudnn(),
        "nccl": _nccl(),
        "driver": facts.driver if facts else None,
        "triton": (TRITON.version or "of unknown version") if TRITON.available() else None,
        "cc": _program("CC", "gcc", "clang"),
        "cxx": _program("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")),
    }
    installed = {name: installed_version(name) for name in _DISTRIBUTIONS}
    return {name: version for name, version in (found | installed).items() if version is not None}


def _program(variable: str, *names: str) -> str | None:
    """Name of the compiler that triton ("CC") or torch.compile ("CXX") takes: the variable's, else the first found."""
    chosen = os.environ.get(variable)
    candidates = (chosen,) if chosen else names
    paths = (shutil.which(name) for name in candidates)
    return next((os.path.basename(path) for path in paths if path), None)


def _cudnn() -> str | None:
    import torch

    cudnn: Any = torch.backends.cudnn  # untyped in torch
    version = cudnn.version() if cudnn.is_available() else None
    return None if version is None else f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _nccl() -> str | None:
    import torch

    if torch.version.cuda is None or not torch.distributed.is_nccl_available():
        return None
    nccl: Any = torch.cuda.nccl  # untyped in torch
    return ".".join(str(part) for part in nccl.version())


def _links(gpus: tuple[DeviceProfile, ...], facts: nvml.Facts) -> tuple[Link, ...]:
    pairs = [(i, j) for j in range(len(gpus)) for i in range(j)]
    kinds = [facts.links.get(frozenset((str(gpus[i].uuid), str(gpus[j].uuid)))) for i, j in pairs]
    return tuple(Link(i, j, kind) for (i, j), kind in zip(pairs, kinds, strict=True) if kind is not None)


def _other_accelerator() -> str:
    """A note where this torch build reaches an accelerator that is not detected."""
    import torch

    if torch.version.hip is not None:
        return "torch is built for ROCm: AMD GPUs are not detected yet, the profile is the CPU's"
    if torch.backends.mps.is_available():
        return "torch has an Apple GPU (mps): not detected yet, the profile is the CPU's"
    if torch.xpu.is_available():
        return "torch has an Intel GPU (xpu): not detected yet, the profile is the CPU's"
    return ""
