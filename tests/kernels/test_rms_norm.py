"""RMSNorm: the kernels against float64, the operators under torch.compile."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kpt_lightning.kernels import rms_norm as norms
from kpt_lightning.validation.numerics import sqnr_db

pytest.importorskip("triton", reason="the kernels are written in Triton")
from triton.runtime import interpreter

from kpt_lightning.kernels import rms_norm_triton as kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EPS = 1e-5

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="Triton's interpreter is on only where there is no GPU"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.sm89),
]
# NumPy, which the interpreter computes with, warns of what IEEE arithmetic defines.
numpy_warns = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
on_device = pytest.mark.parametrize("device", DEVICES)

# Several rows in a block, none full; a row longer than a tile; rows of one element.
SHAPES = [(37, 48), (131, 100), (3, 2500), (9, 1)]
# dtypes of x, weight and result.
DTYPES = [(FP32, FP32, FP32), (FP32, FP32, BF16), (BF16, BF16, BF16), (BF16, FP32, FP32), (FP16, FP16, FP16)]
# The interpreter cuts bf16 off instead of rounding it, and "llama" rounds twice.
LIMITS = {FP32: 5e-6, FP16: 3e-3, BF16: 2e-2}


def random(*shape: int, dtype: torch.dtype = FP32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_near(found: Tensor, exact: Tensor, *dtypes: torch.dtype, terms: Tensor | None = None) -> None:
    """Equal up to rounding of these dtypes, of the largest element or of terms that cancel."""
    limit = max(LIMITS[dtype] for dtype in (found.dtype, *dtypes))
    sizes = (exact if terms is None else terms).abs()
    size = sizes[sizes.isfinite()].max().item()
    torch.testing.assert_close(found.double(), exact, rtol=limit, atol=limit * size, equal_nan=True)


def exact_norm(x: Tensor, weight: Tensor, offset: float = 0.0, eps: float = EPS) -> Tensor:
    return norms.rms_norm_reference(x.double(), weight.double(), eps, offset, "gemma", torch.float64)[0]


def forward(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None, **changed: Any
) -> tuple[Tensor, Any, Tensor]:
    given = {"residual": None, "eps": EPS, "offset": 0.0, "round_first": True} | changed
    return kernels.launch_forward(x, weight=weight, out_dtype=out_dtype or x.dtype, **given)


def backward(grad: Tensor, x: Tensor, weight: Tensor, **changed: Any) -> tuple[Tensor, Tensor]:
    given = {"grad_summed": None, "offset": 0.0, "round_first": True} | changed
    rstd = norms.rms_norm_reference(x, weight, EPS, 0.0, "gemma", FP32)[1]
    return kernels.launch_backward(grad, x=x, weight=weight, rstd=rstd, **given)


def exact_backward(
    grad: Tensor, x: Tensor, weight: Tensor, grad_summed: Tensor | None = None, offset: float = 0.0
) -> tuple[Tensor, ...]:
    """By autograd in float64, independent of the formula in the reference."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    outputs = [exact_norm(x, weight, offset)] + ([] if grad_summed is None else [x * 1.0])
    grads = [each.double() for each in (grad, grad_summed) if each is not None]
    return torch.autograd.grad(outputs, [x, weight], grads)


@pytest.fixture(autouse=True)
def interpreter_counts_with_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter bounds loops by arrays of one element, which NumPy 2.4 takes for no numbers."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@on_device
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


@on_device
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_llamas_rule_rounds_before_the_weight_and_gemmas_does_not(device: str, dtype: torch.dtype) -> None:
    x, weight = random(37, 48, dtype=dtype, device=device), torch.ones(48, device=device)
    rounded, exact = (forward(x, weight, FP32, round_first=first)[0] for first in (True, False))
    assert torch.equal(rounded, rounded.to(dtype).float())
    assert not torch.equal(exact, exact.to(dtype).float())


@on_device
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


@on_device
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


@on_device
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


@on_device
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
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


@on_device
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


@on_device
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
@on_device
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
@on_device
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


@on_device
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


@on_device
def test_the_same_bits_every_time(device: str) -> None:
    x, weight, grad = (random(*size, device=device, seed=sum(size)) for size in ((200, 48), (48,), (200, 48)))

    def run() -> list[Tensor]:
        found = (*forward(x, weight, residual=grad), *kernels.launch_quantize(x, weight, EPS, 0.0, True, E4M3))
        return [*found, *backward(grad, x, weight)]

    assert all(torch.equal(a.float(), b.float()) for a, b in zip(run(), run(), strict=True))


@on_device
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


MODULES = [(LlamaRMSNorm, "llama", 0.0), (GemmaRMSNorm, "gemma", 1.0)]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("module", "casting", "offset"), MODULES)
def test_on_a_cpu_the_norm_is_that_of_transformers(
    module: type[torch.nn.Module], casting: norms.Casting, offset: float, dtype: torch.dtype
) -> None:
    norm = module(48, EPS).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = random(2, 5, 48, dtype=dtype).requires_grad_()
    found = norms.rms_norm(x, norm.weight, EPS, offset=offset, casting=casting)
    expected = norm(x)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    grad = random(2, 5, 48, dtype=dtype, seed=3)
    pairs = zip(*(torch.autograd.grad(y, [x, norm.weight], grad) for y in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=LIMITS[dtype], atol=LIMITS[dtype])


def norm_of(x: Tensor, weight: Tensor) -> Tensor:
    return norms.rms_norm(x * 2, weight, EPS, out_dtype=BF16).float() * x


def add_norm_of(x: Tensor, weight: Tensor) -> Tensor:
    y, summed = norms.rms_norm_add((x * 2).to(BF16), x, weight, EPS, casting="gemma", offset=1.0)
    return y * 3 + summed


def second_output_of(x: Tensor, weight: Tensor) -> Tensor:
    return norms.rms_norm_add(x, x * 3, weight, EPS)[1]


def eager_and_compiled(
    compiled: Callable[..., Tensor], eager: Callable[..., Tensor], device: str
) -> list[list[Tensor]]:
    found = []
    for function in (eager, compiled):
        x, weight = (random(*size, device=device).requires_grad_() for size in ((3, 7, 48), (48,)))
        y = function(x, weight)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, torch.zeros(48) if weight.grad is None else weight.grad])
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [norm_of, add_norm_of, second_output_of])
def test_compiled_code_keeps_the_operator_and_its_gradients(
    device: str, backend: str, function: Callable[..., Tensor]
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, found = eager_and_compiled(compiled, function, device)
    for one, other in zip(found, expected, strict=True):
        # Compiled code skips a rounding to bf16 between two operations that it fuses.
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * other.abs().max().item())
    assert any(each.abs().sum() > 0 for each in found[1:])


@pytest.mark.parametrize("function", [norm_of, add_norm_of])
def test_gradients_of_the_operators_are_those_of_float64(function: Callable[..., Tensor]) -> None:
    x, weight = random(6, 48).requires_grad_(), random(48, seed=1).requires_grad_()
    grad = random(6, 48, seed=2)
    found = torch.autograd.grad(function(x, weight), [x, weight], grad)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    if function is norm_of:
        y = exact_norm(wide * 2, wide_weight) * wide
    else:
        y = exact_norm(wide * 3, wide_weight, 1.0) * 3 + wide * 3
    for one, other in zip(found, torch.autograd.grad(y, [wide, wide_weight], grad.double()), strict=True):
        assert_near(one, other, BF16)


@pytest.mark.parametrize("rows", [5, 0])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_operators_keep_their_contract_with_torch(rows: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, 48, dtype=dtype), random(48)
    kpt, rstd = torch.ops.kpt, torch.rand(rows)
    leaf, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.library.opcheck(kpt.rms_norm, (leaf, leaf_weight, EPS, 0.0, "llama", BF16))
    torch.library.opcheck(kpt.rms_norm_add, (leaf, x.float(), leaf_weight, EPS, 1.0, "gemma", dtype))
    torch.library.opcheck(kpt.rms_norm_backward, (x, x, x, weight, rstd, 0.0, "llama"))
    torch.library.opcheck(kpt.rms_norm_backward, (x, None, x, weight, rstd, 0.0, "gemma"))
    torch.library.opcheck(kpt.rms_norm_quantize, (x, weight, EPS, 0.0, "llama", E4M3))


def test_rms_norm_quantize_is_rms_norm_cast() -> None:
    x, weight = random(37, 48), random(48, seed=1)
    rows, columns, scale, rstd = norms.rms_norm_quantize(x, weight, EPS, dtype=E4M3)
    assert sqnr_db(norms.rms_norm(x, weight, EPS), rows.float() * scale) > 24
    assert torch.equal(columns.float(), rows.float().t())
    grad_x, grad_weight = norms.rms_norm_backward(x, x, weight, rstd)
    expected = exact_backward(x, x, weight)
    assert_near(grad_x, expected[0])
    assert_near(grad_weight, expected[1])


def test_what_has_no_derivative_says_so() -> None:
    x, weight = random(5, 48).requires_grad_(), random(48).requires_grad_()
    (grad,) = torch.autograd.grad(norms.rms_norm(x, weight, EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    scale = norms.rms_norm_quantize(x, weight, EPS, dtype=E4M3)[2]
    with pytest.raises(RuntimeError, match="none at all"):
        scale.backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: norms.rms_norm(x, w, EPS, casting="t5"), "casting='t5'"),
        (lambda x, w: norms.rms_norm(x.double(), w, EPS), "float64"),
        (lambda x, w: norms.rms_norm(x, w[1:], EPS), r"weight \(47,\)"),
        (lambda x, w: norms.rms_norm(x, w, EPS, out_dtype=E4M3), "out_dtype"),
        (lambda x, w: norms.rms_norm(x.new_empty(1, 16385), x.new_empty(16385), EPS), "1 to 16384"),
        (lambda x, w: norms.rms_norm_add(x, x[1:], w, EPS), "residual"),
        (lambda x, w: norms.rms_norm_quantize(x[None], w, EPS, dtype=E4M3), "two dimensions"),
        (lambda x, w: norms.rms_norm_quantize(x, w, EPS, dtype=BF16), "bfloat16"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[Tensor, Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(random(5, 48), random(48))


@pytest.mark.sm89
@pytest.mark.parametrize("casting", ["llama", "gemma"])
def test_the_operators_on_a_gpu_agree_with_a_cpu(casting: norms.Casting) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        x, residual = (random(1000, 2048, device=device, seed=seed).requires_grad_() for seed in (0, 1))
        weight = random(2048, device=device, seed=2).requires_grad_()
        y, summed = norms.rms_norm_add(x, residual, weight, EPS, casting=casting)
        (y.square() + summed).sum().backward()
        fp8 = norms.rms_norm_quantize(x.detach(), weight.detach(), EPS, dtype=E4M3, casting=casting)
        found[device] = [each.cpu() for each in (y.detach(), x.grad, residual.grad, weight.grad, fp8[2], fp8[3])]
    for one, other in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3 * other.abs().max().item())


@pytest.mark.cuda
@pytest.mark.parametrize(("casting", "rounded"), [("llama", True), ("gemma", False)])
def test_the_casting_rule_reaches_the_kernels(casting: norms.Casting, rounded: bool) -> None:
    x, weight = random(64, 256, dtype=BF16, device="cuda"), torch.ones(256, device="cuda")
    alone = norms.rms_norm(x, weight, EPS, casting=casting, out_dtype=FP32)
    after, _ = norms.rms_norm_add(x, x, weight, EPS, casting=casting, out_dtype=FP32)
    for y in (alone, after):
        assert torch.equal(y, y.bfloat16().float()) is rounded
