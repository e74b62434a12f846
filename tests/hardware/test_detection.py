"""The detector on this machine, against torch and the process's own environment."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from kpt_lightning import hardware
from kpt_lightning.hardware import HardwareProfile, cpu

IN_A_FRESH_PROCESS = """
import json, torch
from kpt_lightning.hardware import detect
profile = detect()
print(json.dumps({"cuda_started": torch.cuda.is_initialized(), "profile": profile.to_dict()}))
"""


def detect_fresh(**environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def test_the_profile_is_recorded_and_survives_json() -> None:
    profile = hardware.detect()
    assert (profile.recorded, profile.origin) == (True, "detected")
    assert HardwareProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


def test_the_devices_are_those_that_torch_sees() -> None:
    profile = hardware.detect()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        assert [device.name for device in profile.devices] == names
        assert profile.kind == "cuda"
    else:
        assert profile.devices == (profile.host,)
        assert profile.kind == "cpu"
    assert profile.host == cpu.detect_cpu()


def test_the_versions_are_those_of_the_running_programs() -> None:
    versions = hardware.detect().versions
    assert versions["torch"] == torch.__version__
    assert versions["python"] == platform.python_version()
    assert versions.get("cuda") == torch.version.cuda
    assert versions["lightning"] == metadata.version("lightning")


@pytest.mark.parametrize(("variable", "key"), [("CC", "cc"), ("CXX", "cxx")])
def test_a_compiler_is_named_by_its_variable_and_absent_where_there_is_none(
    variable: str, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "my-compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv(variable, str(compiler))
    assert hardware.detect().versions[key] == "my-compiler"
    monkeypatch.setenv(variable, str(tmp_path / "absent"))
    assert key not in hardware.detect().versions
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert key not in hardware.detect().versions


def test_detection_does_not_start_cuda() -> None:
    seen = detect_fresh()
    alike = len({device["name"] for device in seen["profile"]["devices"]}) == 1
    if alike and not any(device["mig"] for device in seen["profile"]["devices"]):
        assert seen["cuda_started"] is False


@pytest.mark.cuda
def test_hidden_gpus_are_not_devices_and_are_noted() -> None:
    profile = detect_fresh(CUDA_VISIBLE_DEVICES="")["profile"]
    assert [device["kind"] for device in profile["devices"]] == ["cpu"]
    assert any("CUDA_VISIBLE_DEVICES hides all" in note for note in profile["notes"])


@pytest.mark.multi_gpu
def test_cuda_visible_devices_picks_the_gpu_that_torch_picks() -> None:
    profile = detect_fresh(CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID")["profile"]
    ours = [device["uuid"] for device in profile["devices"]]
    code = "import torch; print(torch.cuda.get_device_properties(0).uuid)"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ours == [f"GPU-{done.stdout.strip()}"]
