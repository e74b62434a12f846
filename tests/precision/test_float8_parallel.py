"""Layers of one input as one FP8 product give what FP8 layers one by one give."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kpt_lightning.precision.float8_linear import Float8Settings, float8_linear
from kpt_lightning.precision.float8_parallel import float8_parallel
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.precision.recipes import TENSORWISE
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.numerics import sqnr_db

SETTINGS = Float8Settings(TENSORWISE, emulate=True)
LEAST = gate(Numerics.PRECISION, torch.bfloat16).layer_db
assert LEAST is not None


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    loss = sum((each.double() * torch.arange(1, each.shape[-1] + 1)).sin().sum() for each in outputs)
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("rows", [(32,), (2, 3, 7), (1,), (5,)])
@pytest.mark.parametrize("sizes", [(48,), (64, 16, 16)])
@pytest.mark.parametrize("biased", [True, False])
def test_outputs_and_all_gradients_are_those_of_plain_layers_to_fp8(
    rows: tuple[int, ...], sizes: tuple[int, ...], biased: bool
) -> None:
    x, *weights = drawn((*rows, 32), *((size, 32) for size in sizes))
    biases = drawn(*((size,) for size in sizes)) if biased else [None] * len(sizes)
    wanted = [x, *weights, *(each for each in biases if each is not None)]
    exact = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    found = float8_parallel(x, weights, biases, SETTINGS)
    # The very same gradient of the outputs for both.
    seeds = [torch.randn_like(each) for each in exact]
    for one, other in zip(exact, found, strict=True):
        assert other.shape == one.shape
        assert sqnr_db(one, other) > LEAST
    exact_grads = torch.autograd.grad(exact, wanted, seeds)
    for one, other in zip(exact_grads, torch.autograd.grad(found, wanted, seeds), strict=True):
        assert other.dtype == one.dtype
        assert sqnr_db(one, other) > LEAST


@pytest.mark.parametrize("autocast", [True, False])
def test_one_layer_alone_gives_the_bits_of_an_fp8_linear_layer(autocast: bool) -> None:
    x, weight, bias = drawn((9, 32), (48, 32), (48,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one = float8_linear(x, weight, bias, SETTINGS)
        (other,) = float8_parallel(x, [weight], [bias], SETTINGS)
    assert torch.equal(one, other)
    for first, second in zip(gradients([one], [x, weight, bias]), gradients([other], [x, weight, bias]), strict=True):
        assert torch.equal(first, second)


def test_three_layers_are_one_gemm_a_direction_and_are_counted_as_three() -> None:
    x, *weights = drawn((32, 32), (64, 32), (16, 32), (16, 32))
    with count_gemms() as counts:
        gradients(float8_parallel(x, weights, [None] * 3, SETTINGS), [x, *weights])
    assert (counts.launched, counts.total) == (3, 9)
    assert counts.calls["output", 32, 64, 32] == 1
    assert counts.calls["output", 32, 16, 32] == 2
    assert counts.calls["grad_input", 32, 32, 16] == 2
    assert counts.calls["grad_weight", 16, 32, 32] == 2


def test_frozen_weights_and_an_input_without_gradient_cost_no_gemm() -> None:
    x, weight = drawn((32, 32), (64, 32))
    with count_gemms() as counts:
        float8_parallel(x, [weight.detach()], [None], SETTINGS)[0].sum().backward()
        float8_parallel(x.detach(), [weight], [None], SETTINGS)[0].sum().backward()
        with torch.no_grad():
            float8_parallel(x, [weight], [None], SETTINGS)
    assert (counts.of_role("output"), counts.of_role("grad_input"), counts.of_role("grad_weight")) == (3, 1, 1)


def test_compiled_code_has_the_gradients_of_eager_code() -> None:
    x, *weights = drawn((32, 32), (64, 32), (16, 32))

    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return float8_parallel(x, weights, [None] * len(weights), SETTINGS)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    one, other = run(x, *weights), compiled(x, *weights)
    for first, second in zip(
        [*one, *gradients(one, [x, *weights])], [*other, *gradients(other, [x, *weights])], strict=True
    ):
        torch.testing.assert_close(first, second)


def test_a_second_derivative_is_refused() -> None:
    x, weight = drawn((32, 32), (64, 32))
    (out,) = float8_parallel(x, [weight], [None], SETTINGS)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
