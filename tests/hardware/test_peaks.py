"""Peak rates: dense, for one GPU, with a source; and None where nothing is known."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import DeviceProfile, HardwareProfile, peaks

Load = Callable[[str], HardwareProfile]

# Multiprocessors, dense float16 operations per clock and multiprocessor with float32 accumulation, boost clock in GHz.
# Their product is the dense peak, derived without the tensor figures of the data sheets.
CHIPS = {
    "Tesla V100-SXM2-16GB": (80, 1024, 1.530),
    "Tesla V100-PCIE-16GB": (80, 1024, 1.370),
    "Tesla T4": (40, 1024, 1.590),
    "NVIDIA A100-SXM4-80GB": (108, 2048, 1.410),
    "NVIDIA A30": (56, 2048, 1.440),
    "NVIDIA A40": (84, 1024, 1.740),
    "NVIDIA A10": (72, 1024, 1.695),
    "NVIDIA RTX A6000": (84, 1024, 1.800),
    "NVIDIA GeForce RTX 3090": (82, 512, 1.695),
    "NVIDIA GeForce RTX 3080": (68, 512, 1.710),
    "NVIDIA GeForce RTX 4090": (128, 512, 2.520),
    "NVIDIA GeForce RTX 4080": (76, 512, 2.505),
    "NVIDIA L4": (58, 1024, 2.040),
    "NVIDIA L40S": (142, 1024, 2.520),
    "NVIDIA RTX 6000 Ada Generation": (142, 1024, 2.505),
    "NVIDIA H100 80GB HBM3": (132, 4096, 1.830),
    "NVIDIA H100 PCIe": (114, 4096, 1.620),
    "NVIDIA H200": (132, 4096, 1.830),
    "NVIDIA GeForce RTX 5090": (170, 512, 2.407),
    "NVIDIA GeForce RTX 5080": (84, 512, 2.617),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (188, 1024, 2.617),
    "NVIDIA B200": (148, 8192, 1.850),
}


def gpu(name: str) -> DeviceProfile:
    return DeviceProfile(kind="cuda", vendor="nvidia", name=name, architecture="any", memory_bytes=80 * 2**30)


@pytest.mark.parametrize("name", CHIPS)
def test_float16_peaks_are_dense_and_follow_from_units_and_clock(name: str) -> None:
    multiprocessors, operations, gigahertz = CHIPS[name]
    peak = peaks.peak_flops(gpu(name), "float16")
    assert peak is not None
    assert peak.flops == pytest.approx(multiprocessors * operations * gigahertz * 1e9, rel=0.025)


@pytest.mark.parametrize("sheet", peaks.SHEETS, ids=lambda sheet: sheet.names[0])
def test_formats_keep_their_ratios(sheet: peaks.Sheet) -> None:
    rate = sheet.tera
    if "bfloat16" in rate:
        assert rate["bfloat16"] == rate["float16"]
        assert rate["tf32"] == pytest.approx(rate["float16"] / 2, rel=0.02)
    if "float8" in rate:
        assert rate["float8"] == pytest.approx(2 * rate["float16"], rel=0.03)
    assert rate["float32"] < rate["float16"]


def test_fp8_figures_exist_exactly_where_there_are_fp8_units() -> None:
    with_fp8 = {sheet.names[0] for sheet in peaks.SHEETS if "float8" in sheet.tera}
    older = ("V100", "T4", "A100", "A30", "A40", "A10", "RTX A6000", "GeForce RTX 30")
    assert with_fp8 == {sheet.names[0] for sheet in peaks.SHEETS if not sheet.names[0].startswith(older)}


def test_each_name_has_one_row_and_each_row_an_nvidia_source() -> None:
    names = [name for sheet in peaks.SHEETS for name in sheet.names]
    assert len(names) == len(set(names))
    hosts = ("https://www.nvidia.com/", "https://images.nvidia.com/", "https://resources.nvidia.com/")
    assert all(sheet.source.startswith(hosts) for sheet in peaks.SHEETS)


@pytest.mark.parametrize(
    ("profile", "dtype", "tera"),
    [
        ("v100", "float16", 125),
        ("t4", "int8", 130),
        ("a100", "bfloat16", 312),
        ("l4", "float8", 242.5),
        ("h100", "float8", 1978.9),
        ("h200", "bfloat16", 989.5),
        ("b200", "bfloat16", 2250),
    ],
)
def test_the_profile_gives_the_figure_of_its_primary_device(load: Load, profile: str, dtype: str, tera: float) -> None:
    peak = load(profile).peak_flops(dtype)
    assert peak is not None
    assert peak.flops == pytest.approx(tera * 1e12)
    assert peak.source.startswith("https://")


def test_memory_bandwidth_comes_from_the_same_row(load: Load) -> None:
    bandwidth = load("h200").peak_bandwidth()
    assert bandwidth is not None
    assert bandwidth.bytes_per_second == 4.8e12


@pytest.mark.parametrize("profile", ["h100_mig", "cpu_only", "cpu_amx"])
def test_mig_slices_and_cpus_have_no_figure(load: Load, profile: str) -> None:
    assert load(profile).peak_flops("bfloat16") is None
    assert load(profile).peak_bandwidth() is None


@pytest.mark.parametrize("name", ["NVIDIA H100", "NVIDIA H2000", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_a_name_that_is_only_similar_has_no_figure(name: str) -> None:
    assert peaks.peak_flops(gpu(name), "bfloat16") is None


@pytest.mark.parametrize(("profile", "dtype"), [("v100", "bfloat16"), ("t4", "tf32"), ("a100", "float8")])
def test_a_format_that_the_device_lacks_has_no_figure(load: Load, profile: str, dtype: str) -> None:
    assert load(profile).peak_flops(dtype) is None


def test_a_lowered_power_limit_is_told_in_the_source(load: Load) -> None:
    limited = replace(load("h100").primary, power_limit_watts=500.0)
    peak = peaks.peak_flops(limited, "bfloat16")
    assert peak is not None
    assert peak.source.endswith("(at 700 W; this device is limited to 500 W)")


def test_an_unknown_dtype_raises_with_the_known_names(load: Load) -> None:
    with pytest.raises(ConfigError, match="float32, tf32, float16"):
        load("h100").peak_flops("fp8")
