"""Triton's compiler takes the kernels for an H200, without one: the interpreter accepts more than it does."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

COMPILE = """
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

triton.runtime.driver.set_active(Driver())
made = {}

def compile_only(self, grid):
    def call(*arguments, **options):
        kernel = self.run(*arguments, grid=grid, warmup=True, **options)
        made.setdefault(self.fn.__name__, []).append(kernel.asm["ptx"])
    return call

JITFunction.__getitem__ = compile_only
"""

QUANTIZE = """
from kpt_lightning.kernels.quantize_triton import quantize
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for written in (torch.float8_e4m3fn, torch.float8_e5m2):
        quantize([torch.zeros(256, 256, dtype=dtype)], written, 1, True, True)
for shape in ((1, 1), (1, 70), (70, 1), (33, 35)):
    quantize([torch.zeros(shape)], torch.float8_e4m3fn, 1, True, True)
quantize([torch.zeros(64, 64)] * 2, torch.float8_e4m3fn, 0, True, False)
quantize([torch.zeros(64, 64)] * 2, torch.float8_e4m3fn, 1, False, True)
"""

GATED = """
from kpt_lightning.kernels.gated_triton import gated_backward_quantize, gated_quantize
for activation in ("silu", "gelu_tanh"):
    for rows, width in ((256, 2048), (1, 1), (33, 35)):
        gate_up, grad = torch.zeros(rows, 2 * width).bfloat16(), torch.zeros(rows, width).bfloat16()
        for columns in (True, False):
            gated_quantize(gate_up, activation, torch.float8_e4m3fn, columns)
            gated_backward_quantize(grad, gate_up, activation, torch.float8_e5m2, columns)
"""


@pytest.mark.parametrize(
    ("launches", "kernels"),
    [
        pytest.param(QUANTIZE, {"_amax_kernel", "_cast_kernel"}, id="quantize"),
        pytest.param(
            GATED, {"_amax_kernel", "_cast_kernel", "_backward_amax_kernel", "_backward_cast_kernel"}, id="gated"
        ),
    ],
)
def test_every_kernel_compiles_and_moves_16_bytes_at_a_time(launches: str, kernels: set[str]) -> None:
    code = f"{COMPILE}{launches}\nprint(json.dumps(made))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert set(made) == kernels
    for name, (aligned, *_) in made.items():
        # Of sizes that are multiples of 16; else the memory's bandwidth is out of reach.
        assert "ld.global.v4.b32" in aligned
        assert ("st.global.v4.b32" in aligned) == ("cast" in name)
        assert ("cvt.rn.satfinite.e" in aligned) == ("cast" in name)
