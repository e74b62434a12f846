"""NVIDIA GPUs as the driver library reports them, without a CUDA context."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from kpt_lightning.optional import NVML

T = TypeVar("T")

# CUDA cores in one multiprocessor, by compute capability; NVML counts cores only.
# https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#compute-capabilities
_CORES_PER_SM = {(7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64}
_CORES_PER_SM_SINCE_86 = 128


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of the machine, visible to CUDA or not, in PCI bus order.

    Attributes:
        name: Product name.
        uuid: "GPU-" and the identity.
        capability: Compute capability (major, minor).
        memory_bytes: Memory, the driver's own share included.
        multiprocessors: Streaming multiprocessors, None where the driver does not count cores.
        mig: Whether the GPU is split into slices.
        power_limit_watts: Power limit in force.
        power_default_watts: Power limit as sold.
    """

    name: str
    uuid: str
    capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int | None
    mig: bool
    power_limit_watts: float | None
    power_default_watts: float | None


@dataclass(frozen=True, slots=True)
class Facts:
    """What NVML says of the machine.

    Attributes:
        driver: Driver version.
        cuda: Newest CUDA version that the driver can run, as (major, minor).
        gpus: All GPUs in PCI bus order.
        links: Kind of link by the UUIDs of the two ends.
    """

    driver: str
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]
    links: dict[frozenset[str], str]


def read() -> Facts | None:
    """Ask NVML, None where it is not installed, has no driver to talk to, or withholds a needed fact."""
    if not NVML.available():
        return None
    with _session() as nvml:
        return _facts(nvml) if nvml is not None else None


@contextmanager
def _session() -> Iterator[Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _facts(nvml: Any) -> Facts | None:
    try:
        driver = str(nvml.nvmlSystemGetDriverVersion())
        version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        gpus = tuple(_gpu(nvml, handle) for handle in handles)
    except nvml.NVMLError:
        return None
    links = {
        frozenset((gpus[i].uuid, gpus[j].uuid)): _link(nvml, handles[i], handles[j])
        for i in range(len(gpus))
        for j in range(i)
    }
    known = {ends: kind for ends, kind in links.items() if kind is not None}
    return Facts(driver, (version // 1000, version % 1000 // 10), gpus, known)


def _gpu(nvml: Any, handle: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    cores = _ask(nvml, lambda: int(nvml.nvmlDeviceGetNumGpuCores(handle)))
    mode = _ask(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle))
    return Gpu(
        name=str(nvml.nvmlDeviceGetName(handle)),
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        capability=(major, minor),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        multiprocessors=cores // _CORES_PER_SM.get((major, minor), _CORES_PER_SM_SINCE_86) if cores else None,
        mig=mode is not None and bool(mode[0]),
        power_limit_watts=_ask(nvml, lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000),
        power_default_watts=_ask(nvml, lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) / 1000),
    )


def _link(nvml: Any, first: Any, second: Any) -> str | None:
    status = _ask(nvml, lambda: nvml.nvmlDeviceGetP2PStatus(first, second, nvml.NVML_P2P_CAPS_INDEX_NVLINK))
    if status == nvml.NVML_P2P_STATUS_OK:
        return "nvlink"
    level = _ask(nvml, lambda: int(nvml.nvmlDeviceGetTopologyCommonAncestor(first, second)))
    if level is None:
        return None
    if level <= nvml.NVML_TOPOLOGY_HOSTBRIDGE:
        return "pcie"
    return "node" if level <= nvml.NVML_TOPOLOGY_NODE else "system"


def _ask(nvml: Any, question: Callable[[], T]) -> T | None:
    """An answer that a GPU, a virtual machine or an old driver may refuse."""
    try:
        return question()
    except nvml.NVMLError:
        return None
