"""NVIDIA GPUs that this process may use, from Volta to Blackwell.

NVML is asked first, since it needs no CUDA context: a launcher may still fork after detection. torch.cuda is asked,
which starts CUDA in this process, only where NVML cannot tell what CUDA sees: NVML is missing, a GPU is split into MIG
slices, unlike GPUs are numbered by speed (CUDA's default order), or the driver looks too old for this torch build.
"""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from kpt_lightning.hardware import nvml
from kpt_lightning.hardware.device import DeviceProfile

_MIG_SLICE = re.compile(r" MIG (\S+)$")


def detect_nvidia(facts: nvml.Facts | None, environment: Mapping[str, str]) -> tuple[tuple[DeviceProfile, ...], str]:
    """The visible GPUs in torch's order, and a note where GPUs cannot be used ("" where there is none).

    Args:
        facts: What NVML says, None where it says nothing.
        environment: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER are read from it; pass ``os.environ``.
    """
    import torch

    if torch.version.cuda is None:
        seen = f"{len(facts.gpus)} NVIDIA GPU(s)" if facts else "an NVIDIA driver"
        absent = facts is None and not os.path.exists("/proc/driver/nvidia/version")
        return (), "" if absent else f"this machine has {seen}, but torch {torch.__version__} is built without CUDA"
    cuda: Any = torch.cuda  # torch leaves is_initialized untyped
    driver_runs_build = facts is not None and facts.cuda[0] >= int(torch.version.cuda.split(".")[0])
    if facts is not None and driver_runs_build and not cuda.is_initialized():
        positions = visible(facts.gpus, environment)
        if positions is not None:
            hidden = "" if positions else f"CUDA_VISIBLE_DEVICES hides all {len(facts.gpus)} NVIDIA GPU(s)"
            return tuple(_from_nvml(facts.gpus[index], facts.driver) for index in positions), hidden
    return _from_torch(facts)


def architecture(capability: tuple[int, int]) -> str:
    """Generation by compute capability, "sm_61" and the like for those outside Volta to Blackwell.

    Source: https://developer.nvidia.com/cuda-gpus
    """
    major, minor = capability
    if major == 7:
        return "turing" if minor >= 5 else "volta"
    if major == 8:
        return "ada" if minor == 9 else "ampere"
    generations = {9: "hopper", 10: "blackwell", 11: "blackwell", 12: "blackwell"}
    return generations.get(major, f"sm_{major}{minor}")


def mig_slice(name: str) -> str | None:
    """The slice in a device name such as "NVIDIA H100 80GB HBM3 MIG 1g.10gb", None for a whole GPU."""
    found = _MIG_SLICE.search(name)
    return found.group(1) if found else None


def visible(gpus: Sequence[nvml.Gpu], environment: Mapping[str, str]) -> list[int] | None:
    """Positions in ``gpus`` of the GPUs that CUDA sees, in its order; None where only CUDA itself can tell.

    CUDA reads CUDA_VISIBLE_DEVICES up to the first entry that names no GPU. Entries are numbers or leading parts of a
    UUID. https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#cuda-environment-variables
    """
    if any(gpu.mig for gpu in gpus):
        return None
    alike = len({(gpu.name, gpu.capability, gpu.memory_bytes) for gpu in gpus}) <= 1
    numbers_known = alike or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(range(len(gpus))) if numbers_known else None
    found: list[int] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.isdigit() and not numbers_known:
            return None
        position = _position(entry, gpus)
        if position is None:
            break
        found.append(position)
    return found if len(set(found)) == len(found) else None


def _position(entry: str, gpus: Sequence[nvml.Gpu]) -> int | None:
    if entry.isdigit():
        return int(entry) if int(entry) < len(gpus) else None
    if not entry.startswith("GPU-"):
        return None
    matching = [index for index, gpu in enumerate(gpus) if gpu.uuid.startswith(entry)]
    return matching[0] if len(matching) == 1 else None


def _from_nvml(gpu: nvml.Gpu, driver: str) -> DeviceProfile:
    return DeviceProfile(
        kind="cuda",
        vendor="nvidia",
        name=gpu.name,
        architecture=architecture(gpu.capability),
        memory_bytes=gpu.memory_bytes,
        capability=gpu.capability,
        multiprocessors=gpu.multiprocessors,
        driver=driver,
        uuid=gpu.uuid,
        power_limit_watts=gpu.power_limit_watts,
        power_default_watts=gpu.power_default_watts,
    )


def _from_torch(facts: nvml.Facts | None) -> tuple[tuple[DeviceProfile, ...], str]:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        return (), "; ".join(str(warning.message) for warning in caught)
    by_uuid = {gpu.uuid: gpu for gpu in facts.gpus} if facts else {}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        uuid = f"GPU-{properties.uuid}"
        gpu = by_uuid.get(uuid)
        devices.append(
            DeviceProfile(
                kind="cuda",
                vendor="nvidia",
                name=properties.name,
                architecture=architecture((properties.major, properties.minor)),
                memory_bytes=properties.total_memory,
                capability=(properties.major, properties.minor),
                multiprocessors=properties.multi_processor_count,
                mig=mig_slice(properties.name),
                driver=facts.driver if facts else None,
                uuid=uuid,
                power_limit_watts=gpu.power_limit_watts if gpu else None,
                power_default_watts=gpu.power_default_watts if gpu else None,
            )
        )
    return tuple(devices), ""
