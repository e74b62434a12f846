"""RMS norm as operators of torch: gradients, compilation, contracts and errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kpt_lightning.kernels import rms_norm as norms
from kpt_lightning.validation.numerics import sqnr_db

pytest.importorskip("triton", reason="the kernels are written in Triton")

from tests.kernels.norms import BF16, E4M3, EPS, FP32, LIMITS, assert_near, exact_backward, exact_norm, random

pytestmark = pytest.mark.usefixtures("interpreter_counts_with_numpy")

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
