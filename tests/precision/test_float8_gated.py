"""A gated MLP in FP8 as one gives what its formula gives, to FP8, forward and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kpt_lightning.precision.float8_gated import ACTIVATIONS, float8_gated
from kpt_lightning.precision.float8_linear import Float8Settings, float8_linear
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.precision.recipes import TENSORWISE
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.numerics import sqnr_db

SETTINGS = Float8Settings(TENSORWISE, emulate=True)
LEAST = gate(Numerics.PRECISION, torch.bfloat16).layer_db
assert LEAST is not None
ACTIVATE = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def drawn(rows: tuple[int, ...] = (37,), width: int = 32, inner: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, width), (inner, width), (inner, width), (width, inner))
    # Weights as a fresh layer has them, so that the middle is of order one.
    return [
        (torch.randn(shape, generator=generator) * (1.0 if number == 0 else shape[-1] ** -0.5)).requires_grad_()
        for number, shape in enumerate(shapes)
    ]


def exact(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    return (ACTIVATE[activation](x @ gate.t()) * (x @ up.t())) @ down.t()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [(64,), (37,), (2, 3, 5), (1,)])
def test_output_and_all_gradients_are_those_of_the_formula_to_fp8(rows: tuple[int, ...], activation: str) -> None:
    given = drawn(rows)
    one, other = exact(*given, activation), float8_gated(*given, activation, SETTINGS)
    assert other.shape == one.shape
    assert sqnr_db(one, other) > LEAST
    seed = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    for first, second in zip(
        torch.autograd.grad(one, given, seed), torch.autograd.grad(other, given, seed), strict=True
    ):
        assert second.dtype == first.dtype
        assert sqnr_db(first, second) > LEAST


def test_it_is_as_near_as_three_fp8_layers() -> None:
    x, *weights = drawn((512,))
    gate, up, down = weights
    one = exact(x, *weights, "silu")
    middle = F.silu(float8_linear(x, gate, None, SETTINGS)) * float8_linear(x, up, None, SETTINGS)
    layers = float8_linear(middle, down, None, SETTINGS)
    assert sqnr_db(one, float8_gated(x, *weights, "silu", SETTINGS)) > sqnr_db(one, layers) - 1


def test_autocast_sets_the_dtype_of_the_output_and_gradients_have_that_of_their_weights() -> None:
    given = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        out = float8_gated(*given, "silu", SETTINGS)
    assert out.dtype is torch.bfloat16
    assert {each.dtype for each in torch.autograd.grad(out.float().sum(), given)} == {torch.float32}


def test_gate_and_up_are_one_gemm_a_direction_and_count_as_two_layers() -> None:
    given = drawn((32,))
    with count_gemms() as counts:
        float8_gated(*given, "silu", SETTINGS).sum().backward()
    assert (counts.launched, counts.total) == (6, 9)
    assert counts.calls["output", 32, 64, 32] == 2
    assert counts.calls["output", 32, 32, 64] == 1
    assert counts.calls["grad_weight", 64, 32, 32] == 2


@pytest.mark.parametrize(
    ("frozen", "gemms"), [((1, 2, 3), (2, 2, 0)), ((0, 1, 2), (2, 0, 1)), ((3,), (2, 2, 1)), ((0,), (2, 1, 2))]
)
def test_what_is_frozen_costs_no_gemm_and_gets_no_gradient(frozen: tuple[int, ...], gemms: tuple[int, ...]) -> None:
    given = [each.detach() if number in frozen else each for number, each in enumerate(drawn())]
    with count_gemms() as counts:
        float8_gated(*given, "silu", SETTINGS).sum().backward()
    assert counts.launched == sum(gemms)
    for number, each in enumerate(given):
        assert (each.grad is None) == (number in frozen)


def test_compiled_code_has_the_gradients_of_eager_code() -> None:
    given = drawn()
    compiled = torch.compile(lambda *all: float8_gated(*all, "silu", SETTINGS), fullgraph=True, backend="aot_eager")
    one, other = float8_gated(*given, "silu", SETTINGS), compiled(*given)
    torch.testing.assert_close(one, other)
    for first, second in zip(
        torch.autograd.grad(one.sin().sum(), given), torch.autograd.grad(other.sin().sum(), given), strict=True
    ):
        torch.testing.assert_close(first, second)


def test_a_second_derivative_is_refused() -> None:
    given = drawn()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(float8_gated(*given, "silu", SETTINGS).sum(), given[0], create_graph=True)
