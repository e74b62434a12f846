"""Hardware markers, resolved once, and guards that fail the test that leaks global state."""

import functools
import os
from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Before triton is imported: its kernels then run as Python, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Lightning, torch and their compilers write these on their own; a test cannot help it. They are restored all the same.
WRITTEN_BY_LIBRARIES = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",
        "CUDA_DEVICE_ORDER",
        "CUDA_MODULE_LOADING",
        "KINETO_LOG_LEVEL",
        "KMP_DUPLICATE_LIB_OK",
        "KMP_INIT_AT_FORK",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "OMP_NUM_THREADS",
        "PL_GLOBAL_SEED",
        "PL_SEED_WORKERS",
        "PYTEST_CURRENT_TEST",
        "RANK",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "TRITON_PTXAS_PATH",
        "WORLD_SIZE",
        "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
    }
)

CAPABILITY_NEEDED = {"cuda": (0, 0), "sm89": (8, 9), "sm90": (9, 0)}

# What a Trainer or a test may switch for the whole process: name -> (read, write).
GLOBAL_FLAGS: dict[str, tuple[Callable[[], object], Callable[..., object]]] = {
    "torch.get_default_dtype()": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.get_float32_matmul_precision()": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch.are_deterministic_algorithms_enabled()": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch.is_grad_enabled()": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.backends.cudnn.conv.fp32_precision": (
        lambda: torch.backends.cudnn.conv.fp32_precision,
        lambda value: setattr(torch.backends.cudnn.conv, "fp32_precision", value),
    ),
    "torch.backends.cudnn.deterministic": (
        lambda: torch.backends.cudnn.deterministic,
        lambda value: setattr(torch.backends.cudnn, "deterministic", value),
    ),
    "torch.backends.cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
}


@functools.cache
def missing_hardware(marker: str) -> str | None:
    """What this machine lacks for tests with this marker, None where it can run them."""
    count = torch.cuda.device_count()
    if marker == "multi_gpu":
        return None if count >= 2 else f"needs two or more NVIDIA GPUs; this machine has {count}"
    needed = CAPABILITY_NEEDED[marker]
    wish = (
        "an NVIDIA GPU" if needed == (0, 0) else f"an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or newer"
    )
    if count == 0:
        return f"needs {wish}; this machine has no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(0)
    if capability < needed:
        name = torch.cuda.get_device_name(0)
        return f"needs {wish}; this machine has {name} ({capability[0]}.{capability[1]})"
    return None


def pytest_configure(config: pytest.Config) -> None:
    """Let pass what one library warns another of; every other warning stays an error."""
    # Lightning 2.6 asks torch's pytree by a name that torch 2.13 deprecates.
    config.addinivalue_line("filterwarnings", "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
    # torch 2.13 does all three itself while it compiles.
    config.addinivalue_line("filterwarnings", "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:.*Function'> should not be instantiated:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say what it lacks."""
    for item in items:
        names = {marker.name for marker in item.iter_markers()} & {*CAPABILITY_NEEDED, "multi_gpu"}
        reasons = [reason for name in sorted(names) if (reason := missing_hardware(name))]
        if reasons:
            item.add_marker(pytest.mark.skip(reason="; ".join(reasons)))


@pytest.fixture(autouse=True)
def no_leaked_environment() -> Iterator[None]:
    """Fail the test that leaves an environment variable behind; restore what it changed."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in set(changed) - {"PYTEST_CURRENT_TEST"}:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
    leaked = sorted(set(changed) - WRITTEN_BY_LIBRARIES)
    assert not leaked, f"the test changed environment variables and did not restore them: {leaked}"


@pytest.fixture(autouse=True)
def no_changed_global_flags() -> Iterator[None]:
    """Fail the test that leaves a process-wide torch flag changed; restore it."""
    before = {name: read() for name, (read, _) in GLOBAL_FLAGS.items()}
    yield
    changed = {}
    for name, (read, write) in GLOBAL_FLAGS.items():
        if (value := read()) != before[name]:
            changed[name] = f"{before[name]} -> {value}"
            write(before[name])
    assert not changed, f"the test changed process-wide flags and did not restore them: {changed}"


@pytest.fixture(autouse=True)
def no_leaked_process_group() -> Iterator[None]:
    """Fail the test that leaves a process group in this process; destroy it."""
    yield
    leaked = torch.distributed.is_available() and torch.distributed.is_initialized()
    if leaked:
        torch.distributed.destroy_process_group()
    assert not leaked, "the test left torch.distributed initialized; call destroy_process_group() or use a subprocess"


@pytest.fixture
def every_size() -> Iterator[None]:
    """FP8 kernels for tensors of a few rows, which in a run are not worth their launches."""
    from kpt_lightning.precision.kernel_sizes import at_every_size

    with at_every_size():
        yield
