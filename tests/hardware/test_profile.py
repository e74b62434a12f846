"""Decisions on stored profiles of machines from Volta to Blackwell and of CPUs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import DeviceProfile, HardwareProfile, features

NAMES = sorted(path.stem for path in (Path(__file__).parent / "profiles").glob("*.json"))
Load = Callable[[str], HardwareProfile]

# Which machine can do what, as public papers say; the order is that of features.NAMES.
FEATURES = ["bf16", "fp8_tensorwise", "fp8_rowwise", "mxfp8", "nvfp4", "compile", "flash_attention", "tf32"]
USABLE = {
    "v100": "compile",
    "t4": "compile",
    "a100": "bf16 compile flash_attention tf32",
    "a10": "bf16 compile flash_attention tf32",
    "l4": "bf16 fp8_tensorwise compile flash_attention tf32",
    "rtx4090": "bf16 fp8_tensorwise compile flash_attention tf32",
    "h100": "bf16 fp8_tensorwise fp8_rowwise compile flash_attention tf32",
    "h200": "bf16 fp8_tensorwise fp8_rowwise compile flash_attention tf32",
    "h100_mig": "bf16 fp8_tensorwise fp8_rowwise compile flash_attention tf32",
    "b200": " ".join(FEATURES),
    "mixed_a100_h100": "bf16 compile flash_attention tf32",
    "cpu_only": "flash_attention",
    "cpu_amx": "bf16 compile flash_attention",
}


def tpu() -> DeviceProfile:
    return DeviceProfile(kind="xla", vendor="google", name="TPU v5e", architecture="v5e", memory_bytes=16 * 2**30)


def mi300x() -> DeviceProfile:
    return DeviceProfile(
        kind="cuda", vendor="amd", name="AMD Instinct MI300X", architecture="gfx942", memory_bytes=192 * 10**9
    )


def m3() -> DeviceProfile:
    return DeviceProfile(kind="mps", vendor="apple", name="Apple M3 Max", architecture="m3", memory_bytes=64 * 2**30)


def test_the_table_of_this_test_covers_each_profile_and_feature() -> None:
    assert sorted(USABLE) == NAMES
    assert list(features.NAMES) == FEATURES


@pytest.mark.parametrize("name", NAMES)
def test_each_feature_is_decided_as_the_hardware_papers_say(load: Load, name: str) -> None:
    usable = {feature for feature in FEATURES if load(name).supports(feature)}
    assert usable == set(USABLE[name].split())


RECORDED = ("h200",)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("feature", FEATURES)
def test_each_decision_names_its_subject_and_gives_a_reason(load: Load, name: str, feature: str) -> None:
    decision = load(name).supports(feature)
    assert decision.subject == feature
    assert len(decision.reason) > 15


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_survives_json(load: Load, name: str, tmp_path: Path) -> None:
    profile = load(name)
    profile.save(tmp_path / "profile.json")
    assert HardwareProfile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("name", NAMES)
def test_stored_profiles_say_whether_a_machine_was_asked(load: Load, name: str) -> None:
    profile = load(name)
    assert profile.recorded == (name in RECORDED)
    assert profile.origin.startswith("detected 20" if profile.recorded else "public data sheet")


def test_a_rejected_fp8_says_what_the_machine_has_and_what_fp8_needs(load: Load) -> None:
    assert load("a100").supports("fp8_tensorwise").reason == (
        "NVIDIA A100-SXM4-80GB (ampere, compute capability 8.0) has no FP8 unit; FP8 needs Ada, Hopper or newer"
    )


def test_on_unlike_devices_the_weakest_decides_and_is_named(load: Load) -> None:
    profile = load("mixed_a100_h100")
    assert profile.is_mixed
    assert profile.primary.name == "NVIDIA A100 80GB PCIe"
    rejected = profile.supports("fp8_tensorwise")
    assert "NVIDIA A100 80GB PCIe (ampere" in rejected.reason
    assert "the weakest of 2 unlike devices decides" in rejected.reason
    accepted = profile.supports("bf16")
    assert accepted
    assert "NVIDIA A100 80GB PCIe (ampere" in accepted.reason


def test_like_devices_are_not_mixed(load: Load) -> None:
    (device,) = load("h100").devices
    pair = replace(load("h100"), devices=(device, replace(device, uuid="GPU-2", memory_bytes=device.memory_bytes - 1)))
    assert not pair.is_mixed
    assert "unlike" not in pair.supports("fp8_tensorwise").reason


@pytest.mark.parametrize(("name", "kind"), [("h100", "cuda"), ("h100_mig", "cuda"), ("cpu_amx", "cpu")])
def test_the_kind_is_that_of_the_device_that_decides(load: Load, name: str, kind: str) -> None:
    profile = load(name)
    assert profile.kind == profile.primary.kind == kind
    assert profile.host.kind == "cpu"


@pytest.mark.parametrize("device", [tpu(), mi300x(), m3()], ids=lambda device: device.vendor)
def test_other_vendors_fit_the_schema_and_get_no_guess(load: Load, device: DeviceProfile) -> None:
    profile = HardwareProfile(devices=(device,), host=load("cpu_only").host, versions={"triton": "3.6.0", "cc": "gcc"})
    assert HardwareProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    for feature in FEATURES:
        decision = profile.supports(feature)
        assert not decision
        assert f"no rule for {device.vendor} devices of kind '{device.kind}' yet" in decision.reason
    assert profile.peak_flops("bfloat16") is None


@pytest.mark.parametrize(
    ("name", "without", "words"),
    [
        ("h100", "triton", "pip install 'kpt-lightning[gpu]'"),
        ("h100", "cc", "install gcc or set CC"),
        ("cpu_amx", "cxx", "install g++ or set CXX"),
    ],
)
def test_compile_is_rejected_without_its_compilers_and_says_what_to_install(
    load: Load, name: str, without: str, words: str
) -> None:
    profile = load(name)
    versions = {key: value for key, value in profile.versions.items() if key != without}
    decision = replace(profile, versions=versions).supports("compile")
    assert not decision
    assert words in decision.reason


def test_an_unknown_feature_raises_with_the_known_names(load: Load) -> None:
    with pytest.raises(ConfigError, match="fp8_tensorwise, fp8_rowwise") as caught:
        load("h100").supports("fp8")
    assert caught.value.value == "fp8"


def test_a_profile_of_another_schema_is_refused(load: Load) -> None:
    with pytest.raises(ConfigError, match="schema=99"):
        HardwareProfile.from_dict(load("h100").to_dict() | {"schema": 99})


def test_an_unknown_key_is_refused_by_name(load: Load) -> None:
    data = load("h100").to_dict()
    data["devices"][0]["colour"] = "green"
    with pytest.raises(ConfigError, match="colour"):
        HardwareProfile.from_dict(data)


@pytest.mark.parametrize("key", ["devices", "host"])
def test_a_missing_key_is_refused_by_name(load: Load, key: str) -> None:
    data = load("h100").to_dict()
    del data[key]
    with pytest.raises(ConfigError, match=key):
        HardwareProfile.from_dict(data)


def test_a_profile_without_devices_is_refused(load: Load) -> None:
    with pytest.raises(ConfigError, match="at least one device"):
        replace(load("h100"), devices=())


def test_a_file_that_is_not_json_is_refused_by_name(load: Load, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json"):
        HardwareProfile.load(tmp_path / "broken.json")
