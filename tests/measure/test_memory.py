import psutil
import pytest
import torch

from kpt_lightning.measure.memory import peak_memory, peak_resident_bytes, reset_peak


def test_cpu_peak_is_at_least_the_resident_set_of_now_and_says_what_it_is():
    ballast = bytearray(64 << 20)
    peak = peak_memory("cpu")
    assert peak.peak_bytes >= 0.95 * psutil.Process().memory_info().rss
    assert peak.reserved_bytes is None
    assert "since the process started" in peak.source
    assert len(ballast) == 64 << 20


def test_cpu_peak_never_falls():
    before = peak_resident_bytes()
    ballast = bytes(32 << 20)
    del ballast
    assert peak_resident_bytes() >= before


def test_other_devices_have_no_figure():
    assert peak_memory("meta") is None


@pytest.mark.cuda
def test_cuda_peak_starts_anew_after_reset():
    others = torch.cuda.memory_allocated()
    big = torch.empty(64 << 20, device="cuda", dtype=torch.uint8)
    del big
    reset_peak("cuda")
    small = torch.empty(1 << 20, device="cuda", dtype=torch.uint8)
    peak = peak_memory("cuda")
    assert small.numel() <= peak.peak_bytes - others < 64 << 20
    assert peak.reserved_bytes >= peak.peak_bytes
