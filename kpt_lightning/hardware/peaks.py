"""Peak rates of NVIDIA GPUs from NVIDIA's own papers, each with its source. An unknown name has none: never a guess.

Three traps of data sheets are undone in the table:

* Tensor figures are often quoted with 2:4 sparsity, twice the dense rate. All figures here are dense.
* GeForce cards multiply float16 and FP8 at full rate only with float16 accumulation. torch accumulates in float32,
  so the float32-accumulate figure is the one here (half, on GeForce).
* Superchip and board figures count several GPUs. All figures here are for one GPU.

A MIG slice has no data sheet figure and its clock differs from the whole card's: None. A lowered power limit changes
the clock that can be held, not the units, so the figure stays the data sheet's and the source says that the limit is
lowered.
"""

from dataclasses import dataclass

from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware.device import DeviceProfile

DTYPES = ("float32", "tf32", "float16", "bfloat16", "float8", "int8")


@dataclass(frozen=True, slots=True)
class Peak:
    """A dense peak rate.

    Attributes:
        flops: Operations per second, a multiply and an add counted as two; integer operations for "int8".
        source: Where the figure comes from.
    """

    flops: float
    source: str


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """The peak rate of device memory.

    Attributes:
        bytes_per_second: Bytes read or written a second.
        source: Where the figure comes from.
    """

    bytes_per_second: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """One product's figures.

    Attributes:
        names: Names the driver gives, without "NVIDIA " or "Tesla " before them.
        tera: Dense 10^12 operations per second by dtype.
        gigabytes: Memory rate in 10^9 bytes per second.
        source: Address of the paper.
    """

    names: tuple[str, ...]
    tera: dict[str, float]
    gigabytes: float
    source: str


def _tera(
    float32: float,
    tf32: float | None = None,
    float16: float | None = None,
    bfloat16: float | None = None,
    float8: float | None = None,
    int8: float | None = None,
) -> dict[str, float]:
    figures = zip(DTYPES, (float32, tf32, float16, bfloat16, float8, int8), strict=True)
    return {dtype: value for dtype, value in figures if value is not None}


_VOLTA = "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
_T4 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
_A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf"
_A30 = "https://www.nvidia.com/content/dam/en-zz/Solutions/data-center/products/a30-gpu/pdf/a30-datasheet.pdf"
_A40 = "https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf"
_A10 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf"
_GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf"
_ADA_PRO = "https://images.nvidia.com/aem-dam/en-zz/Solutions/technologies/NVIDIA-ADA-GPU-PROVIZ-Architecture-Whitepaper_1.1.pdf"
_L4 = "https://www.nvidia.com/en-us/data-center/l4/"
_L40 = "https://images.nvidia.com/content/Solutions/data-center/vgpu-L40-datasheet.pdf"
_L40S = "https://www.nvidia.com/en-us/data-center/l40s/"
_H100_PAPER = "https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c"
_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_GH200 = "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip"
_HGX = "https://www.nvidia.com/en-us/data-center/hgx/"
_GB200 = "https://www.nvidia.com/en-us/data-center/gb200-nvl72/"
_RTX50 = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_RTX_PRO = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/"
    "NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf"
)


def _sheet(names: str, gigabytes: float, source: str, tera: dict[str, float]) -> Sheet:
    return Sheet(names=tuple(names.split("|")), tera=tera, gigabytes=gigabytes, source=source)


# Columns of _tera: float32, tf32, float16, bfloat16, float8, int8.
SHEETS = (
    _sheet("V100-SXM2-16GB|V100-SXM2-32GB", 900, _VOLTA, _tera(15.7, float16=125)),
    _sheet("V100-PCIE-16GB|V100-PCIE-32GB", 900, _VOLTA, _tera(14, float16=112)),
    _sheet("V100S-PCIE-32GB", 1134, _VOLTA, _tera(16.4, float16=130)),
    _sheet("T4", 320, _T4, _tera(8.1, float16=65, int8=130)),
    _sheet("A100-SXM4-40GB", 1555, _A100, _tera(19.5, 156, 312, 312, None, 624)),
    _sheet("A100-PCIE-40GB", 1555, _A100, _tera(19.5, 156, 312, 312, None, 624)),
    _sheet("A100-SXM4-80GB|A100-SXM-80GB", 2039, _A100, _tera(19.5, 156, 312, 312, None, 624)),
    _sheet("A100 80GB PCIe", 1935, _A100, _tera(19.5, 156, 312, 312, None, 624)),
    _sheet("A30", 933, _A30, _tera(10.3, 82, 165, 165, None, 330)),
    _sheet("A40", 696, _A40, _tera(37.4, 74.8, 149.7, 149.7, None, 299.3)),
    _sheet("A10", 600, _A10, _tera(31.2, 62.5, 125, 125, None, 250)),
    _sheet("RTX A6000", 768, _GA102, _tera(38.7, 77.4, 154.8, 154.8, None, 309.7)),
    _sheet("GeForce RTX 3080", 760, _GA102, _tera(29.8, 29.8, 59.5, 59.5, None, 238)),
    _sheet("GeForce RTX 3090", 936, _GA102, _tera(35.6, 35.6, 71, 71, None, 284)),
    _sheet("GeForce RTX 3090 Ti", 1008, _ADA, _tera(40, 40, 80, 80, None, 320)),
    _sheet("GeForce RTX 4080", 716.8, _ADA, _tera(48.7, 48.7, 97.5, 97.5, 194.9, 389.9)),
    _sheet("GeForce RTX 4090", 1008, _ADA, _tera(82.6, 82.6, 165.2, 165.2, 330.3, 660.6)),
    _sheet("RTX 6000 Ada Generation", 960, _ADA_PRO, _tera(91.1, 182.1, 364.2, 364.2, 728.5, 728.5)),
    _sheet("L4", 300, _L4, _tera(30.3, 60, 121, 121, 242.5, 242.5)),
    _sheet("L40", 864, _L40, _tera(90.5, 90.5, 181, 181, 362, 362)),
    _sheet("L40S", 864, _L40S, _tera(91.6, 183, 362, 362, 733, 733)),
    _sheet("H100 80GB HBM3", 3352, _H100_PAPER, _tera(66.9, 494.7, 989.4, 989.4, 1978.9, 1978.9)),
    _sheet("H100 PCIe", 2039, _H100_PAPER, _tera(51.2, 378, 756, 756, 1513, 1513)),
    _sheet("H100 NVL", 3900, _H100, _tera(60, 417.5, 835.5, 835.5, 1670.5, 1670.5)),
    _sheet("H200", 4800, _H200, _tera(67, 494.5, 989.5, 989.5, 1979, 1979)),
    _sheet("H200 NVL", 4800, _H200, _tera(60, 417.5, 835.5, 835.5, 1670.5, 1670.5)),
    _sheet("GH200 480GB", 4000, _GH200, _tera(67, 494.5, 989.5, 989.5, 1979, 1979)),
    _sheet("GH200 144G HBM3e", 4900, _GH200, _tera(67, 494.5, 989.5, 989.5, 1979, 1979)),
    _sheet("B200", 8000, _HGX, _tera(75, 1125, 2250, 2250, 4500, 4500)),
    _sheet("B300 SXM6 AC", 8000, _HGX, _tera(75, 1125, 2250, 2250, 4500)),
    _sheet("GB200", 8000, _GB200, _tera(80, 1250, 2500, 2500, 5000, 5000)),
    _sheet("GeForce RTX 5080", 960, _RTX50, _tera(56.3, 56.3, 112.6, 112.6, 225.1, 450.2)),
    _sheet("GeForce RTX 5090", 1792, _RTX50, _tera(104.8, 104.8, 209.5, 209.5, 419, 838)),
    _sheet(
        "RTX PRO 6000 Blackwell Workstation Edition",
        1792,
        _RTX_PRO,
        _tera(126, 251.9, 503.8, 503.8, 1007.6, 1007.6),
    ),
)

_BY_NAME = {name: sheet for sheet in SHEETS for name in sheet.names}


def sheet_of(device: DeviceProfile) -> Sheet | None:
    """The data sheet of a whole NVIDIA GPU, None for other devices, MIG slices and unknown names."""
    if device.vendor != "nvidia" or device.mig is not None:
        return None
    return _BY_NAME.get(device.name.removeprefix("NVIDIA ").removeprefix("Tesla "))


def peak_flops(device: DeviceProfile, dtype: str) -> Peak | None:
    """Dense peak rate of ``device``, None where no figure is known.

    Raises:
        ConfigError: The dtype is none of :data:`DTYPES`.
    """
    if dtype not in DTYPES:
        raise ConfigError("dtype", dtype, f"must be one of {', '.join(DTYPES)}", "Use one of these names")
    sheet = sheet_of(device)
    if sheet is None or dtype not in sheet.tera:
        return None
    return Peak(sheet.tera[dtype] * 1e12, sheet.source + _power_note(device))


def peak_bandwidth(device: DeviceProfile) -> Bandwidth | None:
    """Memory rate of ``device``, None where no figure is known."""
    sheet = sheet_of(device)
    return None if sheet is None else Bandwidth(sheet.gigabytes * 1e9, sheet.source)


def _power_note(device: DeviceProfile) -> str:
    limit, default = device.power_limit_watts, device.power_default_watts
    if limit is None or default is None or limit >= default:
        return ""
    return f" (at {default:g} W; this device is limited to {limit:g} W)"
