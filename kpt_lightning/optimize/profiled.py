"""The one step that is run under torch's profiler to see its kernels: whether it may be, and what it showed."""

from collections.abc import Callable
from typing import Any

import torch

from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Decision, Rejected
from kpt_lightning.precision.evidence import check_kernels


def why_no_profile(config: KptConfig, device_type: str, whole: bool, *, needs_cuda: bool = True) -> str | None:
    """Why a step is not profiled; None where it is.

    Args:
        config: Whether it is wanted.
        device_type: "cuda" or another.
        whole: The step includes forward and backward.
        needs_cuda: Kernels of CUDA are looked for.
    """
    if torch._C._autograd._profiler_enabled():
        return "another profiler is running"
    if needs_cuda and device_type != "cuda":
        return "no CUDA device to profile"
    if config.verify == "calls":
        return "switched off by verify='calls'"
    if not whole:
        return "manual optimization or Fabric: forward and backward ran outside the step"
    return None


def kernels_of(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What ``run`` returns, and the names of the CUDA kernels that it launched, one entry for each launch."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        result = run()
        torch.cuda.synchronize()
    return result, [event.name for event in profiler.events() or () if event.device_type.name == "CUDA"]


def judge_kernels(names: list[str], calls: int) -> Decision:
    """As ``check_kernels``; a step without a call proves nothing.

    Args:
        names: Of :func:`kernels_of`.
        calls: FP8 GEMMs that the step must have launched, at least.
    """
    return check_kernels(names, calls) if calls else Rejected("fp8 kernels", "the profiled step made no FP8 call")
