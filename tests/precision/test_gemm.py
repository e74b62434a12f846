"""The FP8 GEMM operator and the cast before it; faults planted in either are seen by SQNR."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kpt_lightning.precision.cast import to_float8
from kpt_lightning.precision.gemm import count_gemms, float8_gemm
from kpt_lightning.validation.numerics import sqnr_db

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def uneven(rows: int, columns: int) -> Tensor:
    """Rows and columns whose sizes span six powers of ten: a wrong scale cannot pass unseen."""
    torch.manual_seed(rows + columns)
    return torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[torch.randperm(rows), None]


def gemm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **settings: Any) -> Tensor:
    chosen = {"out_dtype": torch.float32, "fast_accum": True, "emulate": True, "role": "output"} | settings
    return float8_gemm(a, b, scale_a, scale_b, **chosen)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rowwise", [True, False], ids=["rowwise", "tensorwise"])
@pytest.mark.parametrize("grad_dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
def test_emulation_is_equal_to_the_gemm_of_torch_on_a_cpu(
    out_dtype: torch.dtype, rowwise: bool, grad_dtype: torch.dtype, autocast: bool
) -> None:
    axis = -1 if rowwise else None
    a, scale_a = to_float8(torch.randn(32, 96), grad_dtype, axis=axis)
    b, scale_b = to_float8(torch.randn(48, 96), E4M3, axis=axis)
    scale_b = scale_b.reshape(1, -1) if rowwise else scale_b
    # Rowwise kernels of CUDA write bf16 only, so ours writes bf16 and casts on every device.
    settings = {"out_dtype": torch.bfloat16 if rowwise else out_dtype, "use_fast_accum": False}
    try:
        real = torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, **settings).to(out_dtype)
    except (RuntimeError, ValueError) as error:
        if torch.__version__ >= "2.13":
            raise  # it has one: a fault of ours, no reason to skip
        pytest.skip(f"torch {torch.__version__} has no such FP8 GEMM for CPUs: {error}")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for emulate in (True, False):
            got = gemm(a, b.t(), scale_a, scale_b, out_dtype=out_dtype, emulate=emulate)
            assert got.dtype == out_dtype
            written = torch.bfloat16 if rowwise else out_dtype
            eps = torch.finfo(written).eps if written.itemsize < 4 else 0.0
            torch.testing.assert_close(got, real, rtol=1e-5 + eps, atol=1e-5)


def test_a_right_rowwise_product_has_over_20_db_and_each_planted_fault_less() -> None:
    a, weight = uneven(64, 128), uneven(64, 128)
    exact = a @ weight.T
    a8, scale_a = to_float8(a, E4M3, axis=-1)
    w8, scale_w = to_float8(weight, E4M3, axis=-1)
    row = scale_w.reshape(1, -1)
    _, wrong_axis = to_float8(weight.T.contiguous(), E4M3, axis=0)
    _, by_column = to_float8(weight, E4M3, axis=0)
    faults = {
        "scale of a off by two": (a8, w8.t(), scale_a * 2, row),
        "scale of the weight off by two": (a8, w8.t(), scale_a, row / 2),
        "scales of the wrong axis": (a8, w8.t(), scale_a, by_column[:, :64].contiguous()),
        "scales of another order": (a8, w8.t(), scale_a, row.flip(1)),
        "transposed weight": (a8[:, :64].contiguous(), w8[:, :64].contiguous().t().contiguous().t().t(), scale_a, row),
        "weight not scaled back": (a8, w8.t(), scale_a, torch.ones_like(row)),
    }
    assert sqnr_db(exact, gemm(a8, w8.t(), scale_a, row)) > 20
    assert sqnr_db(exact, gemm(a8, w8.t(), scale_a, wrong_axis)) > 20
    for name, operands in faults.items():
        assert sqnr_db(exact, gemm(*operands)) < 20, name


@pytest.mark.parametrize("factor", [0.5, 2.0, 1.2])
def test_a_tensorwise_scale_that_is_off_has_less_than_20_db(factor: float) -> None:
    a, weight = torch.randn(64, 128), torch.randn(48, 128)
    a8, scale_a = to_float8(a, E4M3)
    w8, scale_w = to_float8(weight, E4M3)
    assert sqnr_db(a @ weight.T, gemm(a8, w8.t(), scale_a, scale_w)) > 25
    assert sqnr_db(a @ weight.T, gemm(a8, w8.t(), scale_a * factor, scale_w)) < 20


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize(("axis", "shape"), [(None, ()), (-1, (6, 1)), (0, (1, 10))], ids=str)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_the_cast_fills_the_range_and_its_scale_takes_it_back(
    dtype: torch.dtype, axis: int | None, shape: tuple[int, ...], power_of_two: bool
) -> None:
    x = uneven(6, 10)
    cast, scale = to_float8(x, dtype, axis=axis, power_of_two=power_of_two)
    assert (cast.dtype, cast.shape, scale.shape, scale.dtype) == (dtype, x.shape, shape, torch.float32)
    largest = torch.finfo(dtype).max
    peaks = cast.float().abs().amax() if axis is None else cast.float().abs().amax(dim=axis)
    assert (peaks <= largest).all()
    assert (peaks > largest / 2.3 if power_of_two else peaks == largest).all()
    assert not power_of_two or torch.equal(torch.exp2(torch.log2(scale).round()), scale)
    assert sqnr_db(x, cast.float() * scale) > 20


def test_the_cast_keeps_strides() -> None:
    x = torch.randn(8, 6).t()
    assert to_float8(x, E4M3)[0].stride() == x.stride()


def test_calls_are_counted_by_role_and_size_until_the_block_ends() -> None:
    a, scale = to_float8(torch.randn(16, 32), E4M3)
    b, _ = to_float8(torch.randn(48, 32), E4M3)
    with count_gemms() as outer:
        gemm(a, b.t(), scale, scale)
        with count_gemms() as inner:
            gemm(a, b.t(), scale, scale, role="grad_input")
    gemm(a, b.t(), scale, scale)
    assert outer.calls == {("output", 16, 48, 32): 1, ("grad_input", 16, 48, 32): 1}
    assert inner.calls == {("grad_input", 16, 48, 32): 1}
    assert (outer.total, outer.emulated, outer.of_role("grad_weight")) == (2, 2, 0)


def test_the_shape_rule_of_the_operator_agrees_with_the_operator() -> None:
    a, scale = to_float8(torch.randn(16, 32), E4M3)
    b, _ = to_float8(torch.randn(48, 32), E4M3)
    arguments = (a, b.t(), scale, scale, torch.bfloat16, True, True, "output")
    torch.library.opcheck(torch.ops.kpt.float8_gemm, arguments, test_utils="test_faketensor")
