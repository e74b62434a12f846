"""The FP8 linear layer against a reference written here in plain arithmetic, and against nn.Linear."""

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.validation.numerics import sqnr_db

# (bits of the mantissa, least exponent, largest value) from the OCP FP8 specification:
# https://www.opencompute.org/documents/ocp-8-bit-floating-point-specification-ofp8-revision-1-0-2023-12-01-pdf-1
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
GRAD_TYPE = {"tensorwise": E5M2, "rowwise": E4M3, "rowwise_with_gw_hp": E4M3}
SHAPES = [(64, 128), (3, 7, 128), (2, 3, 5, 128), (1, 128), (128,), (19, 100)]
# name -> (dtype of input and weight, autocast to bf16)
MODES = {
    "fp32": (torch.float32, False),
    "autocast": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
}


@functools.cache
def cpu_lacks_fp8() -> str:
    """Why this torch cannot multiply FP8 on a CPU, empty where it can."""
    a = torch.zeros(16, 16, dtype=torch.float8_e4m3fn)
    one = torch.ones(16, 1)
    try:
        torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError) as error:
        if torch.__version__ >= "2.13":
            raise  # it has one: a fault of ours, no reason to skip
        return f"torch {torch.__version__} has no FP8 GEMM for CPUs: {error}"
    return ""


ON_CPU = pytest.mark.skipif(bool(cpu_lacks_fp8()), reason=cpu_lacks_fp8())
# torch 2.13 warns of what its own compiler does.
OF_TORCH = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.*torch.jit.* is deprecated:DeprecationWarning"
)
BACKENDS = [
    *(pytest.param(name, "cpu", True, id=f"{name}-emulated") for name in RECIPES),
    *(pytest.param(name, "cpu", False, id=f"{name}-cpu", marks=ON_CPU) for name in RECIPES),
    pytest.param("tensorwise", "cuda", True, id="tensorwise-emulated-cuda", marks=pytest.mark.cuda),
    pytest.param("tensorwise", "cuda", False, id="tensorwise-cuda", marks=pytest.mark.sm89),
    pytest.param("rowwise", "cuda", False, id="rowwise-cuda", marks=pytest.mark.sm90),
    pytest.param("rowwise_with_gw_hp", "cuda", False, id="rowwise_with_gw_hp-cuda", marks=pytest.mark.sm90),
]


def rounded(x: Tensor, kind: tuple[int, int, float]) -> Tensor:
    """``x`` on the grid of an FP8 type, halves to even, by arithmetic on exponents."""
    bits, least, largest = kind
    exponent = torch.frexp(x.double())[1] - 1
    step = torch.exp2(exponent.clamp(min=least).double() - bits)
    return (torch.round(x.double() / step) * step).clamp(-largest, largest)


def quantized(x: Tensor, kind: tuple[int, int, float], recipe: str, axis: int | None) -> Tensor:
    """``x`` after a trip through FP8, in fp64. ``axis`` is the one that a scale is shared along, None for both."""
    amax = x.float().abs().max() if axis is None else x.float().abs().amax(axis, keepdim=True)
    scale = kind[2] / amax.clamp(min=1e-12)
    if recipe != "tensorwise":
        scale = (2.0 ** torch.floor(torch.log2(scale.double()))).float()
    return rounded(x.float() * scale, kind) / scale.double()


def reference(x: Tensor, weight: Tensor, grad: Tensor, recipe: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output, grad input and grad weight of a bias-free layer for (M, K), (N, K) and (M, N), in fp64."""
    kind, row, column = GRAD_TYPE[recipe], *((None, None) if recipe == "tensorwise" else (1, 0))
    output = quantized(x, E4M3, recipe, row) @ quantized(weight, E4M3, recipe, row).T
    shared = None if recipe == "rowwise_with_gw_hp" else column
    grad_input = quantized(grad, kind, recipe, row) @ quantized(weight, E4M3, recipe, shared)
    if recipe == "rowwise_with_gw_hp":
        return output, grad_input, grad.double().T @ x.double()
    grad_weight = quantized(grad, kind, recipe, column).T @ quantized(x, E4M3, recipe, column)
    return output, grad_input, grad_weight


def layer_of(shape: tuple[int, ...], dtype: torch.dtype, device: str, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(sum(shape))
    out_features = 50 if shape[-1] % 16 else 80
    layer = nn.Linear(shape[-1], out_features, bias=bias)
    x = torch.randn(shape)
    return layer.to(device, dtype), x.to(device, dtype).requires_grad_()


def run(layer: Any, x: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    """Forward and backward. Returns output and the gradient that was sent back."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16) if autocast else nullcontext():
        out = layer(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out) * 0.01
    out.backward(grad)
    return out, grad


def close(actual: Tensor, expected: Tensor, *written: torch.dtype) -> None:
    """Equal but for the order of fp32 sums, the rounding of the types written, and FP8 units' own accumulation."""
    worst = max(torch.finfo(dtype).eps for dtype in (torch.float32, *written))
    peak = expected.abs().max().item()
    own = 2e-3 if actual.is_cuda else 2e-6
    torch.testing.assert_close(actual.double(), expected, rtol=worst * 1.01 + 1e-5, atol=own * peak)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("recipe", "device", "emulate"), BACKENDS)
def test_output_and_gradients_are_those_of_the_plain_reference(
    float8: Any, recipe: str, device: str, emulate: bool, shape: tuple[int, ...], mode: str
) -> None:
    dtype, autocast = MODES[mode]
    layer, x = layer_of(shape, dtype, device, bias=False)
    out, grad = run(float8(layer, recipe, emulate), x, autocast)
    compute = torch.bfloat16 if autocast else dtype
    rows = x.detach().to(compute).reshape(-1, shape[-1])
    wanted = reference(rows, layer.weight.detach(), grad.reshape(-1, grad.shape[-1]), recipe)
    assert (out.dtype, x.grad.dtype, layer.weight.grad.dtype) == (compute, dtype, dtype)
    written = compute if recipe == "tensorwise" else torch.bfloat16
    close(out.reshape(-1, out.shape[-1]), wanted[0], compute, written)
    close(x.grad.reshape(-1, shape[-1]), wanted[1], compute, written)
    weight_written = {"tensorwise": dtype, "rowwise": torch.bfloat16}.get(recipe, compute)
    close(layer.weight.grad, wanted[2], weight_written, dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("recipe", "device", "emulate"), BACKENDS)
def test_output_and_every_gradient_are_within_20_db_of_nn_linear(
    float8: Any, recipe: str, device: str, emulate: bool, shape: tuple[int, ...], autocast: bool, bias: bool
) -> None:
    layer, x = layer_of(shape, torch.float32, device, bias)
    exact, x_exact = layer_of(shape, torch.float32, device, bias)
    out, grad = run(float8(layer, recipe, emulate), x, autocast)
    exact_out = exact(x_exact)
    exact_out.backward(grad.float())
    assert sqnr_db(exact_out, out) > 20
    assert sqnr_db(x_exact.grad, x.grad) > 20
    assert sqnr_db(exact.weight.grad, layer.weight.grad) > 20
    if bias:
        assert sqnr_db(exact.bias.grad, layer.bias.grad) > 45  # no GEMM: bf16 rounding alone
        assert layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("weight_grad", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("input_grad", [True, False], ids=["inner", "first"])
def test_only_the_gradients_that_are_asked_for_are_computed(
    float8: Any, recipe: str, weight_grad: bool, input_grad: bool
) -> None:
    layer, x = layer_of((64, 128), torch.float32, "cpu")
    float8(layer, recipe).weight.requires_grad_(weight_grad)
    x = x.detach().requires_grad_(input_grad)
    with count_gemms() as counts:
        run(layer, x, True)
    in_fp8 = weight_grad and recipe != "rowwise_with_gw_hp"
    assert [counts.of_role(role) for role in ("output", "grad_input", "grad_weight")] == [1, input_grad, in_fp8]
    assert (x.grad is not None, layer.weight.grad is not None) == (input_grad, weight_grad)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_empty_batch_runs_no_gemm_and_gives_zero_gradients(float8: Any, recipe: str) -> None:
    layer, x = layer_of((0, 7, 128), torch.float32, "cpu")
    with count_gemms() as counts:
        out, _ = run(float8(layer, recipe), x, True)
    assert (counts.total, out.shape, out.dtype) == (0, (0, 7, 80), torch.bfloat16)
    assert x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(80, 128))
    assert torch.equal(layer.bias.grad, torch.zeros(80))


@pytest.mark.parametrize(("recipe", "device", "emulate"), BACKENDS)
def test_inputs_and_weights_of_any_strides_give_the_same_numbers(
    float8: Any, recipe: str, device: str, emulate: bool
) -> None:
    layer, x = layer_of((64, 128), torch.bfloat16, device)
    want, _ = run(float8(layer, recipe, emulate), x, False)
    turned, _ = layer_of((64, 128), torch.bfloat16, device)
    turned.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    y = x.detach().t().contiguous().t().requires_grad_()
    got, _ = run(float8(turned, recipe, emulate), y, False)
    for actual, expected in ((got, want), (y.grad, x.grad), (turned.weight.grad, layer.weight.grad)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_changes_no_number(float8: Any, recipe: str) -> None:
    layer, x = layer_of((19, 100), torch.float32, "cpu")
    out, grad = run(float8(layer, recipe), x, True)
    padded = nn.Linear(112, 64)
    with torch.no_grad():
        padded.weight.zero_()[:50, :100] = layer.weight
        padded.bias.zero_()[:50] = layer.bias
    y = nn.functional.pad(x.detach(), (0, 12, 0, 13)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        padded_out = float8(padded, recipe)(y)
    padded_out.backward(nn.functional.pad(grad, (0, 14, 0, 13)))
    assert torch.equal(out, padded_out[:19, :50])
    assert torch.equal(x.grad, y.grad[:19, :100])
    assert torch.equal(layer.weight.grad, padded.weight.grad[:50, :100])
    assert torch.equal(layer.bias.grad, padded.bias.grad[:50])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("recipe", "device", "emulate"), BACKENDS)
def test_nan_and_infinity_come_out_as_nan(float8: Any, recipe: str, device: str, emulate: bool, value: float) -> None:
    layer, x = layer_of((64, 128), torch.float32, device)
    with torch.no_grad():
        x[3, 5] = value
    out, _ = run(float8(layer, recipe, emulate), x, True)
    assert out[3].isnan().all()
    assert layer.weight.grad[:, 5].isnan().all() or not layer.weight.grad[:, 5].isfinite().any()
    if recipe != "tensorwise":
        assert out[[0, 1, 2, 4, 63]].isfinite().all()


@pytest.mark.parametrize(("recipe", "device", "emulate"), BACKENDS)
def test_a_zero_input_gives_the_bias_and_a_zero_gradient_gives_zeros(
    float8: Any, recipe: str, device: str, emulate: bool
) -> None:
    layer, x = layer_of((64, 128), torch.float32, device)
    x = torch.zeros_like(x).requires_grad_()
    out = float8(layer, recipe, emulate)(x)
    out.backward(torch.zeros_like(out))
    assert torch.equal(out, layer.bias.expand_as(out))
    assert not x.grad.any()
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("recipe", RECIPES)
def test_scaling_follows_the_size_of_the_data(float8: Any, recipe: str, size: float) -> None:
    layer, x = layer_of((64, 128), torch.float32, "cpu", bias=False)
    want = layer(x.detach() * size)
    got = float8(layer, recipe)(x.detach() * size)
    # Below 1e-12 the scale stops growing, so that zero divides nothing: such data round to zero, not to noise.
    assert sqnr_db(want, got) > 20 if size > 1e-9 else got.abs().max() <= 2 * want.abs().max()


@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_do_not_depend_on_memory_that_was_never_written(float8: Any, recipe: str) -> None:
    def once() -> list[Tensor]:
        layer, x = layer_of((19, 100), torch.float32, "cpu")
        out, _ = run(float8(layer, recipe), x, True)
        return [out, x.grad, layer.weight.grad, layer.bias.grad]

    plain = once()
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        assert torch.empty(4).isnan().all()
        poisoned = once()
    finally:
        torch.use_deterministic_algorithms(False)
    for actual, expected in zip(poisoned, plain, strict=True):
        assert torch.equal(actual, expected)


@OF_TORCH
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "fp32"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_traced_layer_gives_the_same_numbers_without_a_graph_break(float8: Any, recipe: str, autocast: bool) -> None:
    layer, x = layer_of((3, 7, 128), torch.float32, "cpu")
    out, _ = run(float8(layer, recipe), x, autocast)
    wanted = [out, x.grad, layer.weight.grad, layer.bias.grad]
    traced, y = layer_of((3, 7, 128), torch.float32, "cpu")
    with count_gemms() as counts:
        got, _ = run(torch.compile(float8(traced, recipe), fullgraph=True, backend="aot_eager"), y, autocast)
    assert counts.total == (2 if recipe == "rowwise_with_gw_hp" else 3)
    for actual, expected in zip([got, y.grad, traced.weight.grad, traced.bias.grad], wanted, strict=True):
        torch.testing.assert_close(actual, expected)


@OF_TORCH
@pytest.mark.parametrize(
    ("recipe", "device", "emulate"),
    [pytest.param("tensorwise", "cpu", True, id="emulated"), *BACKENDS[-3:]],
)
def test_a_compiled_layer_gives_the_same_numbers(
    float8: Any, recipe: str, device: str, emulate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # the compiler writes it and leaves it
    layer, x = layer_of((3, 7, 128), torch.float32, device)
    out, _ = run(float8(layer, recipe, emulate), x, True)
    wanted = [out, x.grad, layer.weight.grad, layer.bias.grad]
    fused, y = layer_of((3, 7, 128), torch.float32, device)
    got, _ = run(torch.compile(float8(fused, recipe, emulate), fullgraph=True), y, True)
    for actual, expected in zip([got, y.grad, fused.weight.grad, fused.bias.grad], wanted, strict=True):
        assert sqnr_db(expected, actual) > 25  # a fused kernel may skip the rounding to bf16 between two steps


def test_a_second_derivative_raises_and_is_not_silently_wrong(float8: Any) -> None:
    layer, x = layer_of((64, 128), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(float8(layer)(x).square().sum(), x, create_graph=True)


def test_a_wrong_number_of_features_raises(float8: Any) -> None:
    layer, _ = layer_of((64, 128), torch.float32, "cpu")
    with pytest.raises(RuntimeError):
        float8(layer)(torch.randn(4, 96))


def test_repr_tells_recipe_and_emulation(float8: Any) -> None:
    text = repr(float8(nn.Linear(32, 16), "rowwise"))
    assert text == "Float8Linear(in_features=32, out_features=16, bias=True, float8=rowwise, emulated)"
