"""RMSNorm: the kernels against float64, the operators under torch.compile."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kpt_lightning.validation.numerics import relative_error, sqnr_db

pytest.importorskip("triton", reason="the kernels are written in Triton")

from kpt_lightning.kernels import rms_norm_triton as kernels
from tests.kernels.norms import (
    BF16,
    E4M3,
    E5M2,
    EPS,
    FP16,
    FP32,
    assert_near,
    backward,
    exact_backward,
    exact_norm,
    random,
)

pytestmark = pytest.mark.usefixtures("interpreter_counts_with_numpy")

# NumPy, which the interpreter computes with, warns of what IEEE arithmetic defines.
numpy_warns = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


# Several rows in a block, none full; a row longer than a tile; rows of one element.
SHAPES = [(37, 48), (131, 100), (3, 2500), (9, 1)]


# dtypes of x, weight and result.
DTYPES = [(FP32, FP32, FP32), (FP32, FP32, BF16), (BF16, BF16, BF16), (BF16, FP32, FP32), (FP16, FP16, FP16)]


def forward(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None, **changed: Any
) -> tuple[Tensor, Any, Tensor]:
    given = {"residual": None, "eps": EPS, "offset": 0.0, "round_first": True} | changed
    return kernels.launch_forward(x, weight=weight, out_dtype=out_dtype or x.dtype, **given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "weight_dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize("casting", ["llama", "gemma"])
def test_the_norm_is_that_of_float64(
    device: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    out_dtype: torch.dtype,
    casting: str,
) -> None:
    x = random(*shape, dtype=dtype, device=device)
    weight = random(shape[1], dtype=weight_dtype, device=device, seed=1)
    y, summed, rstd = forward(x, weight, out_dtype, offset=1.0, round_first=casting == "llama")
    assert summed is None
    assert y.dtype is out_dtype
    assert_near(y, exact_norm(x, weight, 1.0), dtype)
    assert_near(rstd, torch.rsqrt(x.double().square().mean(-1) + EPS))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_llamas_rule_rounds_before_the_weight_and_gemmas_does_not(device: str, dtype: torch.dtype) -> None:
    x, weight = random(37, 48, dtype=dtype, device=device), torch.ones(48, device=device)
    rounded, exact = (forward(x, weight, FP32, round_first=first)[0] for first in (True, False))
    assert torch.equal(rounded, rounded.to(dtype).float())
    assert not torch.equal(exact, exact.to(dtype).float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", list(itertools.product([FP32, BF16], [FP32, BF16])))
def test_the_sum_is_that_of_torch_and_its_norm_that_of_float64(
    device: str, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x, residual = (random(*shape, dtype=dtype, device=device, seed=seed) for seed, dtype in enumerate(dtypes))
    weight = random(shape[1], device=device, seed=2)
    y, summed, _ = forward(x, weight, FP32, residual=residual, round_first=False)
    expected = x + residual
    assert summed.dtype is expected.dtype
    assert_near(summed, expected.double())
    # Of the sum as it was rounded.
    assert_near(y, exact_norm(summed, weight))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "weight_dtype", "grad_dtype"), DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
def test_gradients_are_those_of_float64(
    device: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    with_residual: bool,
) -> None:
    x = random(*shape, dtype=dtype, device=device)
    weight = random(shape[1], dtype=weight_dtype, device=device, seed=1)
    grad = random(*shape, dtype=grad_dtype, device=device, seed=2)
    grad_summed = random(*shape, dtype=dtype, device=device, seed=3) if with_residual else None
    grad_x, grad_weight = backward(grad, x, weight, grad_summed=grad_summed, offset=1.0)
    expected = exact_backward(grad, x, weight, grad_summed, 1.0)
    assert (grad_x.dtype, grad_weight.dtype) == (dtype, weight_dtype)
    rstd = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    assert_near(grad_x, expected[0], terms=grad * (weight + 1.0) * rstd)
    assert_near(grad_weight, expected[1], dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("x_dtype", [FP32, BF16, FP16])
def test_both_fp8_layouts_hold_the_norm(
    device: str, shape: tuple[int, int], dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    x, weight = random(*shape, dtype=x_dtype, device=device), random(shape[1], device=device, seed=1)
    rows, columns, scale, rstd = kernels.launch_quantize(x, weight, EPS, 1.0, False, dtype)
    exact = exact_norm(x, weight, 1.0)
    assert sqnr_db(exact, rows.double() * scale.double()) > {E4M3: 24, E5M2: 18}[dtype]
    assert torch.equal(columns.float(), rows.float().t())
    assert columns.is_contiguous()
    assert_near(scale, exact.abs().max() / torch.finfo(dtype).max)
    assert_near(rstd, torch.rsqrt(x.double().square().mean(-1) + EPS))


def test_inputs_are_read_by_their_strides(device: str) -> None:
    wide = random(37, 200, device=device)
    across = random(48, 37, device=device, seed=1).t()
    weight = random(96, device=device, seed=2)[::2]
    for x, other in ((wide[:, 8:56], across), (across, wide[:, 8:56])):
        dense, other_dense = x.contiguous(), other.contiguous()
        found = (*forward(x, weight, residual=other), *kernels.launch_quantize(x, weight, EPS, 0.0, True, E4M3))
        expected = (
            *forward(dense, weight.contiguous(), residual=other_dense),
            *kernels.launch_quantize(dense, weight, EPS, 0.0, True, E4M3),
        )
        found += backward(other, x, weight, grad_summed=other[:1].expand(37, 48))
        expected += backward(other_dense, dense, weight, grad_summed=other_dense[:1].repeat(37, 1))
        # A GPU adds in an order that follows the strides: the last bit of a sum, and where FP8 rounds it, may differ.
        for one, other in zip(found, expected, strict=True):
            eight_bits = one.dtype.itemsize == 1
            assert relative_error(other.float(), one.float()) < (2e-2 if eight_bits else 1e-5)
            assert (one.float() != other.float()).float().mean() <= 0.01 or not eight_bits


def test_without_rows_results_are_empty_and_the_weight_gradient_zero(device: str) -> None:
    x, weight = torch.empty(0, 48, device=device), random(48, device=device)
    y, summed, rstd = forward(x, weight, residual=x)
    assert (y.shape, summed.shape, rstd.shape) == ((0, 48), (0, 48), (0,))
    rows, columns, scale, _ = kernels.launch_quantize(x, weight, EPS, 0.0, True, E4M3)
    assert (rows.shape, columns.shape) == ((0, 48), (48, 0))
    assert torch.equal(
        scale, torch.ops.kpt.rms_norm_quantize(x.cpu(), weight.cpu(), EPS, 0.0, "llama", E4M3)[2].to(device)
    )
    grad_x, grad_weight = backward(x, x, weight)
    assert grad_x.shape == (0, 48)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("size", [1e15, 1e-15])
@pytest.mark.parametrize("eps", [1e-5, 1e-30])
def test_huge_and_tiny_rows_are_normalized(device: str, size: float, eps: float) -> None:
    x, weight = random(37, 48, device=device) * size, random(48, device=device, seed=1)
    assert_near(forward(x, weight, eps=eps)[0], exact_norm(x, weight, eps=eps))
    rows, _, scale, _ = kernels.launch_quantize(x, weight, eps, 0.0, True, E4M3)
    exact = exact_norm(x, weight, eps=eps)
    if exact.abs().max() > 1e-12:
        assert sqnr_db(exact, rows.double() * scale.double()) > 24


@numpy_warns
def test_rows_of_zeros_are_zeros_even_with_padding_and_no_epsilon(device: str) -> None:
    x, weight = torch.zeros(37, 48, device=device), random(48, device=device)
    rows, _, scale, _ = kernels.launch_quantize(x, weight, EPS, 0.0, True, E4M3)
    assert not rows.float().any()
    assert scale.isfinite()
    # 37 rows leave a block part empty, whose 1 / sqrt(0) must not reach the scale.
    rows, _, scale, _ = kernels.launch_quantize(x + 1, weight, 0.0, 0.0, True, E4M3)
    assert scale.isfinite()
    assert rows.float().isfinite().all()


@numpy_warns
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_carried_as_in_pytorch(device: str, value: float) -> None:
    x, weight = random(37, 48, device=device), random(48, device=device, seed=1)
    x[5, 7] = value
    exact = exact_norm(x, weight)
    y, summed, _ = forward(x, weight, residual=torch.ones_like(x))
    assert_near(y, exact_norm(x + 1, weight))
    assert_near(summed, (x + 1).double())
    rows, columns, _, _ = kernels.launch_quantize(x, weight, EPS, 0.0, True, E4M3)
    assert rows.float()[exact.isnan()].isnan().all()
    assert torch.equal(rows.float().isnan(), columns.float().t().isnan())
    grad = random(37, 48, device=device, seed=2)
    grad_x, grad_weight = backward(grad, x, weight)
    expected = exact_backward(grad, x, weight)
    assert grad_x[5].isnan().all()
    assert_near(grad_x[:5], expected[0][:5])
    assert torch.equal(grad_weight.isnan(), expected[1].isnan())
    grad[3, 4] = value
    grad_x, grad_weight = backward(grad, random(37, 48, device=device), weight)
    assert not grad_x[3].isfinite().any()
    assert not grad_weight[4].isfinite()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_is_written_and_no_other_is_read(
    monkeypatch: pytest.MonkeyPatch, device: str, shape: tuple[int, int]
) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        memory = empty(*args, **kwargs)
        # All bits set is NaN in every float dtype.
        memory.untyped_storage().fill_(255)
        return memory

    x, weight, grad = (random(*size, device=device, seed=sum(size)) for size in (shape, shape[1:], shape))
    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.empty(2, dtype=E4M3).float().isnan().all()
    written = (
        *forward(x, weight, residual=grad),
        *kernels.launch_quantize(x, weight, EPS, 0.0, True, E4M3),
        *backward(grad, x, weight, grad_summed=x),
    )
    assert all(each.float().isfinite().all() for each in written)


def test_the_same_bits_every_time(device: str) -> None:
    x, weight, grad = (random(*size, device=device, seed=sum(size)) for size in ((200, 48), (48,), (200, 48)))

    def run() -> list[Tensor]:
        found = (*forward(x, weight, residual=grad), *kernels.launch_quantize(x, weight, EPS, 0.0, True, E4M3))
        return [*found, *backward(grad, x, weight)]

    assert all(torch.equal(a.float(), b.float()) for a, b in zip(run(), run(), strict=True))


def test_a_launch_configuration_changes_nothing_but_the_order_of_sums(device: str) -> None:
    x, weight, grad = (random(*size, device=device, seed=sum(size)) for size in ((200, 48), (48,), (200, 48)))
    row = kernels.RowLaunch(elements=256, elements_per_thread=4, programs_per_sm=5, num_stages=2)
    tile = kernels.TileLaunch(rows=64, columns=16, num_warps=4)
    few = kernels.TileLaunch(rows=2, columns=16, num_warps=4)
    assert_near(forward(x, weight, config=row)[0], exact_norm(x, weight))
    expected = kernels.launch_quantize(x, weight, EPS, 0.0, True, E4M3)
    found = kernels.launch_quantize(x, weight, EPS, 0.0, True, E4M3, statistics=row, cast=tile)
    assert sqnr_db(expected[1].float() * expected[2], found[1].float() * found[2]) > 40
    gradients = backward(grad, x, weight, config=row, partials=few)
    for one, other in zip(gradients, exact_backward(grad, x, weight), strict=True):
        assert_near(one, other)
