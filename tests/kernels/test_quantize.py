"""The cast to FP8 in both layouts: the kernels against the reference, and the operator under PyTorch's own checks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kpt_lightning.kernels.quantize import cast_both, quantize, quantize_many
from kpt_lightning.precision.cast import to_float8
from kpt_lightning.validation.numerics import sqnr_db

pytest.importorskip("triton", reason="the kernels are written in Triton")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 200), (130, 70), (64, 128), (257, 5), (1, 300), (300, 1)]
# NumPy, which the interpreter computes with, warns of what IEEE arithmetic defines.
numpy_warns = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def by_kernel(parts: list[Tensor], dtype: torch.dtype, dim: int = 1, rows: bool = True, columns: bool = True, **more):
    from kpt_lightning.kernels import quantize_triton

    return quantize_triton.quantize(parts, dtype, dim, rows, columns, **more)


def small_config(**changes: Any) -> Any:
    """Programs that loop and tiles that do not fit, in tensors small enough for the interpreter."""
    from kpt_lightning.kernels.quantize_triton import Config

    settings = dict(
        amax_rows=8, amax_columns=64, amax_warps=4, programs_per_sm=5,
        cast_rows=64, cast_columns=32, cast_warps=4, last_first=True,
    )  # fmt: skip
    return Config(**settings | changes)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def assert_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(got[:2], wanted[:2], strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(bits(one), bits(other))
    assert got[2].shape == ()
    assert torch.equal(got[2], wanted[2])


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("float_dtype", FLOATS, ids=str)
def test_the_reference_follows_the_scale_rule_of_the_precision_layer(
    dtype: torch.dtype, float_dtype: torch.dtype
) -> None:
    x = torch.randn(33, 48).to(float_dtype)
    written, scale = to_float8(x, dtype)
    assert_same(cast_both(x, dtype), (written, written.t().contiguous(), scale))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("float_dtype", FLOATS, ids=str)
def test_the_kernels_write_every_element_of_both_layouts_as_the_reference_does(
    device: str, shape: tuple[int, int], dtype: torch.dtype, float_dtype: torch.dtype
) -> None:
    x = torch.randn(shape, device=device).to(float_dtype)
    for config in (small_config(), small_config(last_first=False, cast_rows=32, cast_columns=64)):
        got = by_kernel([x], dtype, config=config)
        assert_same(got, cast_both(x, dtype))
        assert torch.equal(bits(got[0]).t(), bits(got[1]))
        assert sqnr_db(x.double(), got[0].double() * got[2].double()) > (25 if dtype == E4M3 else 20)


def test_the_default_launch_writes_the_same(device: str) -> None:
    x = torch.randn(150, 96, device=device, dtype=torch.bfloat16)
    assert_same(by_kernel([x], E4M3), cast_both(x, E4M3))


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_every_rounding_and_subnormal_is_that_of_pytorch(device: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    magnitudes = torch.logspace(-7, 0, 3000, dtype=torch.float64, device=device).float() * largest
    ties = (torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()).nan_to_num(0, 0, 0)
    ties = (ties[:-1] + ties[1:]) / 2
    x = torch.cat([magnitudes, -magnitudes, ties, torch.zeros(1, device=device)]).reshape(1, -1)
    # The largest magnitude is the largest FP8 value, so the scale is 1 and ties stay ties.
    got = by_kernel([x], dtype, config=small_config(amax_columns=1024, cast_rows=16, cast_columns=256))
    assert got[2] == 1
    assert_same(got, cast_both(x, dtype))


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("columns", [True, False])
def test_a_layout_that_is_not_wanted_is_empty(device: str, rows: bool, columns: bool) -> None:
    x = torch.randn(40, 24, device=device)
    got = by_kernel([x], E4M3, rows=rows, columns=columns, config=small_config())
    assert_same(got, cast_both(x, E4M3, rows, columns))
    assert got[0].shape == ((40, 24) if rows else (0,))
    assert got[1].shape == ((24, 40) if columns else (0,))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_parts_under_one_scale_are_their_concatenation(device: str, dim: int, dtype: torch.dtype) -> None:
    shapes = [(20, 33), (20, 0), (20, 70)]
    parts = [
        torch.randn(shape if dim else shape[::-1], device=device).bfloat16() * 3**i for i, shape in enumerate(shapes)
    ]
    got = by_kernel(parts, dtype, dim, config=small_config())
    assert_same(got, cast_both(torch.cat(parts, dim), dtype))


def test_strided_inputs_are_read_where_they_lie(device: str) -> None:
    wide = torch.randn(50, 150, device=device, dtype=torch.bfloat16)
    for x in (wide[:, 10:90], wide[::2], wide.t(), wide[:1].expand(7, 150)):
        assert_same(by_kernel([x], E4M3, config=small_config()), cast_both(x, E4M3))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_nothing_gives_nothing_and_the_scale_of_zero(device: str, shape: tuple[int, int]) -> None:
    x = torch.empty(shape, device=device)
    assert_same(by_kernel([x], E4M3), cast_both(x, E4M3))
    assert_same(by_kernel([x], E4M3), (*cast_both(x, E4M3)[:2], cast_both(torch.zeros(2, 2, device=device), E4M3)[2]))


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-20, 1e-12, 1e-3, 1e4, 1e20, 3e38], ids=str)
def test_any_magnitude_of_fp32_is_scaled_as_in_the_reference(device: str, dtype: torch.dtype, magnitude: float) -> None:
    x = torch.rand(20, 40, device=device).mul_(2).sub_(1) * magnitude
    assert_same(by_kernel([x], dtype, config=small_config()), cast_both(x, dtype))


@numpy_warns
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("float_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_come_out_as_nan(
    device: str, dtype: torch.dtype, float_dtype: torch.dtype, bad: float
) -> None:
    x = torch.randn(20, 40, device=device).to(float_dtype)
    x[13, 29] = bad
    rows, columns, scale = by_kernel([x], dtype, config=small_config())
    wanted = cast_both(x, dtype)
    assert rows[13, 29].float().isnan()
    assert columns[29, 13].float().isnan()
    assert torch.equal(rows.float().isnan(), wanted[0].float().isnan())
    assert torch.equal(columns.float().isnan(), wanted[1].float().isnan())
    assert torch.equal(scale, wanted[2]) or (scale.isnan() and wanted[2].isnan())
    assert (rows.float() * scale).isnan().all()


def test_the_same_input_gives_the_same_bits(device: str) -> None:
    x = torch.randn(100, 60, device=device)
    assert_same(by_kernel([x], E4M3, config=small_config()), by_kernel([x], E4M3, config=small_config()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.sm89)])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_operator_keeps_the_rules_of_pytorch(device: str, rows: bool, dim: int) -> None:
    parts = [torch.randn(16, 16, device=device), torch.randn(16, 16, device=device)]
    torch.library.opcheck(torch.ops.kpt.quantize.default, (parts, E4M3, dim, rows, True))
    torch.library.opcheck(torch.ops.kpt.quantize.default, ([parts[0][:1], parts[1][:1]], E5M2, dim, rows, True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.sm89)])
def test_the_compiler_keeps_the_operator_whole(device: str) -> None:
    targets = []

    def seen(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def call(x: Tensor, y: Tensor) -> Any:
        return quantize_many([x, y], E4M3)

    x, y = torch.randn(32, 48, device=device), torch.randn(32, 16, device=device)
    assert_same(torch.compile(call, fullgraph=True, backend="aot_eager")(x, y), call(x, y))
    torch.compile(call, fullgraph=True, backend=seen)(x, y)
    assert targets.count(torch.ops.kpt.quantize) + targets.count(torch.ops.kpt.quantize.default) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.sm89)])
def test_the_public_function_is_the_reference_on_a_cpu_and_the_kernels_on_cuda(device: str) -> None:
    x = torch.randn(40, 56, device=device, dtype=torch.bfloat16)
    assert_same(quantize(x, E5M2), cast_both(x, E5M2))
    assert_same(quantize(x, E5M2, columns=False), cast_both(x, E5M2, columns=False))


@pytest.mark.parametrize(
    ("parts", "dtype", "dim", "said"),
    [
        ([torch.zeros(2, 2)], torch.int8, 1, "dtype"),
        ([torch.zeros(2, 2)], E4M3, 2, "dim 0 or 1"),
        ([], E4M3, 1, "at least one"),
        ([torch.zeros(2)], E4M3, 1, "two dimensions"),
        ([torch.zeros(2, 2, dtype=torch.float64)], E4M3, 1, "fp32"),
        ([torch.zeros(2, 2), torch.zeros(3, 2)], E4M3, 1, "fit"),
        ([torch.zeros(2, 2), torch.zeros(2, 3)], E4M3, 0, "fit"),
        ([torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.float16)], E4M3, 1, "fit"),
    ],
)
def test_what_cannot_be_cast_is_refused_with_the_reason(
    parts: list[Tensor], dtype: torch.dtype, dim: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        quantize_many(parts, dtype, dim=dim)
