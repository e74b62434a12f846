"""Which GPUs CUDA sees, told without CUDA where possible, and how they are called."""

import os
from dataclasses import replace

import pytest
import torch

from kpt_lightning.hardware import nvml
from kpt_lightning.hardware.nvidia import architecture, detect_nvidia, mig_slice, visible

A100 = nvml.Gpu("NVIDIA A100-SXM4-80GB", "GPU-aa11", (8, 0), 80 * 2**30, 108, False, 400.0, 400.0)
H100 = nvml.Gpu("NVIDIA H100 80GB HBM3", "GPU-bb22", (9, 0), 80 * 2**30, 132, False, 700.0, 700.0)
ALIKE = (A100, replace(A100, uuid="GPU-aa12"), replace(A100, uuid="GPU-cc33"))
UNLIKE = (A100, H100)
SPLIT = (replace(A100, mig=True), H100)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((6, 1), "sm_61"),
        ((7, 0), "volta"),
        ((7, 5), "turing"),
        ((8, 0), "ampere"),
        ((8, 6), "ampere"),
        ((8, 7), "ampere"),
        ((8, 9), "ada"),
        ((9, 0), "hopper"),
        ((10, 0), "blackwell"),
        ((10, 3), "blackwell"),
        ((11, 0), "blackwell"),
        ((12, 0), "blackwell"),
        ((12, 1), "blackwell"),
        ((13, 0), "sm_130"),
    ],
)
def test_the_generation_follows_from_the_capability(capability: tuple[int, int], name: str) -> None:
    assert architecture(capability) == name


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "1g.10gb"),
        ("NVIDIA A100-SXM4-40GB MIG 1c.3g.20gb", "1c.3g.20gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb+me", "1g.10gb+me"),
        ("NVIDIA H100 80GB HBM3", None),
    ],
)
def test_a_mig_slice_is_read_from_the_name(name: str, part: str | None) -> None:
    assert mig_slice(name) == part


@pytest.mark.parametrize(
    ("wanted", "positions"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("0, 1", [0, 1]),
        ("0,-1,1", [0]),
        ("-1", []),
        ("7", []),
        ("1,7,0", [1]),
        ("NoDevFiles", []),
        ("GPU-cc", [2]),
        ("GPU-cc33,GPU-aa12", [2, 1]),
        ("GPU-aa", []),
        ("GPU-zz", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(wanted: str | None, positions: list[int]) -> None:
    environment = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    assert visible(ALIKE, environment) == positions


@pytest.mark.parametrize(
    ("environment", "positions"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, None),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [0, 1]),
        ({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bb22,GPU-aa11"}, [1, 0]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_unlike_gpus_numbered_by_speed_are_left_to_cuda(
    environment: dict[str, str], positions: list[int] | None
) -> None:
    assert visible(UNLIKE, environment) == positions


def test_split_gpus_and_repeated_entries_are_left_to_cuda() -> None:
    assert visible(SPLIT, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) is None
    assert visible(ALIKE, {"CUDA_VISIBLE_DEVICES": "0,0"}) is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch build without CUDA")
def test_a_gpu_that_this_torch_build_cannot_reach_is_noted() -> None:
    facts = nvml.Facts("580.95.05", (13, 0), UNLIKE, {})
    devices, note = detect_nvidia(facts, {})
    assert devices == ()
    assert note == f"this machine has 2 NVIDIA GPU(s), but torch {torch.__version__} is built without CUDA"


@pytest.mark.cuda
def test_nvml_and_torch_agree_on_each_gpu() -> None:
    facts = nvml.read()
    by_torch = torch.cuda.get_device_properties(0)
    assert facts is not None, "needs nvidia-ml-py: pip install 'kpt-lightning[gpu]'"
    gpu = next(gpu for gpu in facts.gpus if gpu.uuid == f"GPU-{by_torch.uuid}")
    assert gpu.name == by_torch.name
    assert gpu.capability == (by_torch.major, by_torch.minor)
    assert gpu.multiprocessors == by_torch.multi_processor_count
    assert gpu.memory_bytes == pytest.approx(by_torch.total_memory, rel=0.02)


@pytest.mark.cuda
def test_without_nvml_torch_gives_the_same_gpus() -> None:
    with_nvml, _ = detect_nvidia(nvml.read(), os.environ)
    without, _ = detect_nvidia(None, os.environ)
    assert [device.model for device in without] == [device.model for device in with_nvml]
    assert [device.uuid for device in without] == [device.uuid for device in with_nvml]


@pytest.mark.multi_gpu
def test_each_pair_of_gpus_has_a_link() -> None:
    facts = nvml.read()
    assert facts is not None
    pairs = {frozenset((a.uuid, b.uuid)) for a in facts.gpus for b in facts.gpus if a.uuid != b.uuid}
    assert set(facts.links) == pairs
    assert set(facts.links.values()) <= {"nvlink", "pcie", "node", "system"}
