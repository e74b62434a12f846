"""Gated activations cast to FP8: values and gradients against fp64 autograd, both layouts, and the operators."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kpt_lightning.kernels.gated import (
    ACTIVATIONS,
    gated_backward_quantize,
    gated_gradient,
    gated_quantize,
    gated_value,
)
from kpt_lightning.kernels.quantize import cast_both
from kpt_lightning.validation.numerics import relative_error, sqnr_db

pytest.importorskip("triton", reason="the kernels are written in Triton")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 200), (70, 35), (64, 32), (100, 5)]
on_either = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.sm89)])
# NumPy, which the interpreter computes with, warns of what IEEE arithmetic defines.
numpy_warns = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def small_config(**changes: Any) -> Any:
    """Programs that loop and tiles that do not fit, in tensors small enough for the interpreter."""
    from kpt_lightning.kernels.quantize_triton import Config

    settings = dict(
        amax_rows=8, amax_columns=64, amax_warps=4, programs_per_sm=5,
        cast_rows=64, cast_columns=32, cast_warps=4, last_first=True,
    )  # fmt: skip
    return Config(**settings | changes)


def forward(gate_up: Tensor, activation: str, dtype: torch.dtype, columns: bool = True, **changes: Any) -> Any:
    from kpt_lightning.kernels import gated_triton

    return gated_triton.gated_quantize(gate_up, activation, dtype, columns, config=small_config(**changes))


def backward(
    grad: Tensor, gate_up: Tensor, activation: str, dtype: torch.dtype, columns: bool = True, **changes: Any
) -> Any:
    from kpt_lightning.kernels import gated_triton

    return gated_triton.gated_backward_quantize(
        grad, gate_up, activation, dtype, columns, config=small_config(**changes)
    )


def inputs(device: str, shape: tuple[int, int], dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    rows, width = shape
    torch.manual_seed(rows + width)
    grad, gate_up = torch.randn(rows, width), torch.randn(rows, 2 * width) * spread
    return grad.to(device, dtype), gate_up.to(device, dtype)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def exact(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Value and gradient by PyTorch's own functions and autograd, in fp64."""
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    value = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    value.backward(grad.double())
    return value.detach(), leaf.grad


def assert_right(got: tuple[Tensor, ...], wanted: Tensor, dtype: torch.dtype) -> None:
    """Both layouts hold what rounding the exact result once would give, but for a tie here and there."""
    rows, columns, scale = got
    assert rows.shape == wanted.shape
    assert rows.dtype == columns.dtype == dtype
    assert torch.equal(bits(rows).t(), bits(columns))
    assert columns.is_contiguous()
    best = cast_both(wanted.float(), dtype)
    assert float(scale) == pytest.approx(float(best[2]), rel=1e-5)
    # Where every element is the largest, fp32's own error is all there is.
    wanted_db = min(sqnr_db(wanted, best[0].double() * best[2].double()), 100)
    assert sqnr_db(wanted, rows.double() * scale.double()) > wanted_db - 0.5
    assert (rows.float() != best[0].float()).float().mean() <= 0.02


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS], ids=str)
def test_the_reference_is_pytorchs_own_function_and_gradient(activation: str, dtype: torch.dtype) -> None:
    grad, gate_up = inputs("cpu", (64, 48), dtype)
    value, slope = exact(grad, gate_up, activation)
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    assert relative_error(value, gated_value(gate_up, activation)) < bound
    assert relative_error(slope, gated_gradient(grad, gate_up, activation)) < bound


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("float_dtype", FLOATS, ids=str)
def test_the_kernels_round_the_exact_value_and_gradient_once(
    device: str, shape: tuple[int, int], activation: str, float_dtype: torch.dtype
) -> None:
    grad, gate_up = inputs(device, shape, float_dtype)
    value, slope = exact(grad, gate_up, activation)
    for dtype in (E4M3, E5M2):
        assert_right(forward(gate_up, activation, dtype), value, dtype)
        assert_right(backward(grad, gate_up, activation, dtype), slope, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_other_tiles_and_the_default_launch_give_the_same_bits(device: str, activation: str) -> None:
    from kpt_lightning.kernels import gated_triton

    grad, gate_up = inputs(device, (90, 72), torch.bfloat16)
    changes = dict(last_first=False, cast_rows=32, cast_columns=64, amax_columns=32)
    for one, other, third in zip(
        (*forward(gate_up, activation, E4M3), *backward(grad, gate_up, activation, E5M2)),
        (*forward(gate_up, activation, E4M3, **changes), *backward(grad, gate_up, activation, E5M2, **changes)),
        (
            *gated_triton.gated_quantize(gate_up, activation, E4M3, True),
            *gated_triton.gated_backward_quantize(grad, gate_up, activation, E5M2, True),
        ),
        strict=True,
    ):
        assert torch.equal(one.float(), other.float())
        assert torch.equal(one.float(), third.float())


def test_the_transpose_is_empty_where_not_wanted(device: str) -> None:
    grad, gate_up = inputs(device, (40, 24), torch.bfloat16)
    for with_both, without in (
        (forward(gate_up, "silu", E4M3), forward(gate_up, "silu", E4M3, columns=False)),
        (backward(grad, gate_up, "silu", E4M3), backward(grad, gate_up, "silu", E4M3, columns=False)),
    ):
        assert without[1].shape == (0,)
        assert torch.equal(bits(with_both[0]), bits(without[0]))
        assert torch.equal(with_both[2], without[2])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strided_inputs_are_read_where_they_lie(device: str, activation: str) -> None:
    grad, gate_up = inputs(device, (60, 90), torch.bfloat16)
    for outer, inner in (
        (grad[:, 7:57], gate_up[:, 11:111]),
        (grad[::2], gate_up[::2]),
        (grad.t().contiguous().t(), gate_up.t().contiguous().t()),
        (grad[:1].expand(8, -1), gate_up[:1].expand(8, -1)),
    ):
        value, slope = exact(outer, inner, activation)
        assert_right(forward(inner, activation, E4M3), value, E4M3)
        assert_right(backward(outer, inner, activation, E4M3), slope, E4M3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spread", [1e-15, 1e-6, 30.0, 1e6, 1e15])
def test_any_magnitude_of_the_input_gives_the_exact_result_rounded(device: str, activation: str, spread: float) -> None:
    grad, gate_up = inputs(device, (30, 40), torch.bfloat16, spread)
    value, slope = exact(grad, gate_up, activation)
    assert_right(forward(gate_up, activation, E4M3), value, E4M3)
    assert_right(backward(grad, gate_up, activation, E4M3), slope, E4M3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_from_zero_pass_or_block_exactly(device: str, activation: str) -> None:
    gate = torch.tensor([[-3e38, -1e20, -1e13, -200.0, -100.0, 0.0, 100.0, 200.0, 300.0, 400.0]], device=device)
    gate_up, grad = torch.cat([gate, torch.ones_like(gate)], dim=1), torch.ones_like(gate)
    value, slope = gate.clamp(min=0), torch.tensor([[0.0] * 5 + [0.5] + [1.0] * 4], device=device)
    assert_right(forward(gate_up, activation, E5M2), value.double(), E5M2)
    assert_right(backward(grad, gate_up, activation, E5M2), torch.cat([slope, value], dim=1).double(), E5M2)


@numpy_warns
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("column", [3, 20 + 3], ids=["gate", "up"])
def test_nan_and_infinity_are_carried(device: str, activation: str, bad: float, column: int) -> None:
    grad, gate_up = inputs(device, (40, 20), torch.bfloat16)
    gate_up[17, column] = bad
    rows, columns, scale = forward(gate_up, activation, E4M3)
    wanted = gated_value(gate_up, activation)
    assert rows[17, 3].float().isnan()
    assert columns[3, 17].float().isnan()
    assert torch.equal(rows.float().isnan(), cast_both(wanted, E4M3)[0].float().isnan())
    assert (rows.float() * scale).isnan().any()
    rows, columns, scale = backward(grad, gate_up, activation, E5M2)
    wanted = gated_gradient(grad, gate_up, activation)
    assert torch.equal(rows.float().isnan(), cast_both(wanted, E5M2)[0].float().isnan())
    assert torch.equal(bits(rows).t().isfinite(), bits(columns).isfinite())
    grad[0, 0] = float("nan")
    rows, columns, scale = backward(grad, gate_up, activation, E5M2)
    assert rows[0, 0].float().isnan()
    assert columns[20, 0].float().isnan()
    assert scale.isnan()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=str)
def test_nothing_gives_nothing_and_the_scale_of_zero(device: str, shape: tuple[int, int]) -> None:
    grad, gate_up = inputs(device, shape, torch.bfloat16)
    zero = cast_both(torch.zeros(2, 2, device=device), E4M3)[2]
    for got, width in (
        (forward(gate_up, "silu", E4M3), shape[1]),
        (backward(grad, gate_up, "silu", E4M3), 2 * shape[1]),
    ):
        assert got[0].shape == (shape[0], width)
        assert got[1].shape == (width, shape[0])
        assert torch.equal(got[2], zero)


def test_the_same_input_gives_the_same_bits(device: str) -> None:
    grad, gate_up = inputs(device, (100, 60), torch.bfloat16)
    for call in (lambda: forward(gate_up, "silu", E4M3), lambda: backward(grad, gate_up, "silu", E5M2)):
        for one, other in zip(call(), call(), strict=True):
            assert torch.equal(one.float(), other.float())


@on_either
@pytest.mark.parametrize("columns", [True, False])
def test_the_operators_keep_the_rules_of_pytorch(device: str, columns: bool) -> None:
    for shape in ((16, 32), (1, 1)):
        grad, gate_up = inputs(device, shape, torch.bfloat16)
        torch.library.opcheck(torch.ops.kpt.gated_quantize.default, (gate_up, "silu", E4M3, columns))
        torch.library.opcheck(
            torch.ops.kpt.gated_backward_quantize.default, (grad, gate_up, "gelu_tanh", E5M2, columns)
        )


@on_either
def test_the_compiler_keeps_each_operator_whole(device: str) -> None:
    targets: list[str] = []

    def seen(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def call(grad: Tensor, gate_up: Tensor) -> Any:
        return *gated_quantize(gate_up, "silu", E4M3), *gated_backward_quantize(grad, gate_up, "silu", E5M2)

    grad, gate_up = inputs(device, (32, 48), torch.bfloat16)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(grad, gate_up)
    for one, other in zip(compiled, call(grad, gate_up), strict=True):
        assert torch.equal(one.float(), other.float())
    torch.compile(call, fullgraph=True, backend=seen)(grad, gate_up)
    assert sum("gated" in target for target in targets) == 2


@on_either
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_public_functions_are_right_on_each_device(device: str, activation: str) -> None:
    grad, gate_up = inputs(device, (48, 40), torch.bfloat16)
    value, slope = exact(grad, gate_up, activation)
    assert_right(gated_quantize(gate_up, activation, E4M3), value, E4M3)
    assert_right(gated_backward_quantize(grad, gate_up, activation, E5M2), slope, E5M2)


@pytest.mark.parametrize(
    ("grad", "gate_up", "activation", "dtype", "said"),
    [
        (torch.zeros(2, 2), torch.zeros(2, 4), "relu", E4M3, "activation"),
        (torch.zeros(2, 2), torch.zeros(2, 4), "silu", torch.float16, "dtype"),
        (torch.zeros(2, 2), torch.zeros(2, 5), "silu", E4M3, "gate_up"),
        (torch.zeros(2, 2), torch.zeros(4), "silu", E4M3, "gate_up"),
        (torch.zeros(2, 2), torch.zeros(2, 4, dtype=torch.float64), "silu", E4M3, "gate_up"),
        (torch.zeros(2, 4), torch.zeros(2, 4), "silu", E4M3, "grad"),
        (torch.zeros(2, 2).bfloat16(), torch.zeros(2, 4), "silu", E4M3, "grad"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    grad: Tensor, gate_up: Tensor, activation: str, dtype: torch.dtype, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        gated_backward_quantize(grad, gate_up, activation, dtype)
