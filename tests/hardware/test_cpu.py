"""CPU facts, from texts that Linux prints and from this machine."""

import os
import platform
from pathlib import Path

import psutil
import pytest

from kpt_lightning.hardware import cpu

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse2 avx2 avx512f amx_bf16 avx512_fp16 amx_tile amx_int8 avx512_bf16 avx512_vnni

processor\t: 1
vendor_id\t: Other
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm sve i8mm bf16
CPU implementer\t: 0x41
"""


def test_the_first_processor_of_cpuinfo_is_read() -> None:
    facts = cpu.parse_cpuinfo(XEON)
    assert (facts["vendor_id"], facts["model name"]) == ("GenuineIntel", "Intel(R) Xeon(R) Platinum 8480+")


@pytest.mark.parametrize(
    ("text", "isa"),
    [
        (XEON, "avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8"),
        (GRAVITON, "asimd bf16 i8mm sve"),
        ("", ""),
    ],
    ids=["x86", "arm", "no cpuinfo"],
)
def test_only_the_instruction_sets_that_matter_are_kept(text: str, isa: str) -> None:
    assert cpu.isa_of(cpu.parse_cpuinfo(text)) == tuple(isa.split())


@pytest.mark.parametrize(
    ("limit", "usable"), [("", 100), ("max\n", 100), ("40\n", 40), ("9223372036854771712", 100)], ids=repr
)
def test_a_container_limit_below_the_host_counts(limit: str, usable: int) -> None:
    assert cpu.usable_memory(100, limit) == usable


def test_this_machine_is_described_as_its_own_tools_do() -> None:
    device = cpu.detect_cpu()
    assert (device.kind, device.architecture) == ("cpu", platform.machine())
    assert 0 < device.memory_bytes <= psutil.virtual_memory().total
    assert device.cores is not None
    assert 1 <= device.cores <= (os.cpu_count() or 1)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs /proc/cpuinfo")
def test_on_linux_the_flags_and_the_name_are_those_of_proc() -> None:
    text = Path("/proc/cpuinfo").read_text()
    device = cpu.detect_cpu()
    words = set(text.split())
    assert set(device.isa) == words & set(cpu.ISA)
    if "model name" in text:
        assert device.name in text
