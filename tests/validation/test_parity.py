"""compare_modules lets equal code pass and finds each planted fault."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpt_lightning.validation.calls import ModuleCall, record_calls
from kpt_lightning.validation.parity import compare_modules

BF16 = torch.bfloat16


class RMSNorm(nn.Module):
    """In the way of Llama."""

    def __init__(self, size: int = 24, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class GemmaNorm(nn.Module):
    def __init__(self, size: int = 24) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return ((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)) * (1 + self.weight.float())).to(x.dtype)


class Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


def replaced(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """The same parameters under another forward."""
    other = copy.copy(module)
    other.__class__ = type("Other", (type(module),), {"forward": forward})
    return other


def recorded(module: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> ModuleCall:
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        return record_calls(module, lambda: module(x))[""]


def sample(dtype: torch.dtype = torch.float32, size: int = 24) -> Tensor:
    return torch.randn(2, 5, size, dtype=dtype, requires_grad=True)


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(x)


class _Overwriting(torch.autograd.Function):
    """Right once: the gradient is written over what was saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x.data.mul_(2 * grad)
        return x.data.clone()


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled = 2 * x
        return doubled * doubled


FAULTS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], str]] = {
    "wrong epsilon": (RMSNorm, lambda self, x: F.rms_norm(x, (24,), self.weight, 1e-5), "output"),
    "layer norm for RMS norm": (RMSNorm, lambda self, x: F.layer_norm(x, (24,), self.weight, None, 1e-6), "output"),
    "no (1 + w)": (GemmaNorm, lambda self, x: F.rms_norm(x, (24,), self.weight, 1e-6), "output"),
    "exp(w) for (1 + w)": (GemmaNorm, lambda self, x: F.rms_norm(x, (24,), self.weight.exp(), 1e-6), "other weights"),
    "dropped bias": (lambda: nn.Linear(24, 24), lambda self, x: F.linear(x, self.weight), "output"),
    "transposed weight": (
        lambda: nn.Linear(24, 24),
        lambda self, x: F.linear(x, self.weight.t(), self.bias),
        "output",
    ),
    "wrong backward": (nn.SiLU, lambda self, x: _WrongBackward.apply(x), "gradient of input 0"),
    "tanh for erf": (Gelu, lambda self, x: F.gelu(x, approximate="tanh"), "output"),
    "detached input": (
        lambda: nn.Linear(24, 24),
        lambda self, x: F.linear(x.detach(), self.weight, self.bias),
        "gradient of input 0: no gradient flows",
    ),
    "scale off by two": (lambda: nn.Linear(24, 24), lambda self, x: F.linear(x, 2 * self.weight, self.bias), "output"),
    "other dtype": (RMSNorm, lambda self, x: F.rms_norm(x, (24,), self.weight, 1e-6).double(), "is torch.float64"),
    "other shape": (nn.SiLU, lambda self, x: F.silu(x).flatten(0, 1), "has shape"),
    "other form": (nn.SiLU, lambda self, x: (F.silu(x), None), "another form"),
    "input changed in place": (nn.SiLU, lambda self, x: F.silu(x.detach(), inplace=True) + 0 * x, "in place"),
    "cotangent changed in place": (nn.SiLU, lambda self, x: _EatsCotangent.apply(x), "incoming gradient in place"),
    "saved tensor overwritten": (Square, lambda self, x: _Overwriting.apply(2 * x), "second backward"),
    "division by zero": (RMSNorm, lambda self, x: F.rms_norm(x, (24,), self.weight, 1e-6) + 0 * (x / x), "NaN"),
    "an error": (nn.SiLU, lambda self, x: F.linear(x, x), "fails at scale 1"),
}


class _EatsCotangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        result = grad * s * (1 + x * (1 - s))
        grad.zero_()
        return result


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_rejected_with_the_tensor_that_shows_it(fault: str) -> None:
    make, forward, shown = FAULTS[fault]
    torch.manual_seed(0)
    module = make()

    verdict = compare_modules(module, replaced(module, forward), recorded(module, sample()))

    assert not verdict
    assert shown in verdict.reason


@pytest.mark.parametrize("fault", ["wrong epsilon", "no (1 + w)", "exp(w) for (1 + w)"])
def test_a_fault_is_seen_in_bf16_too(fault: str) -> None:
    make, forward, _ = FAULTS[fault]
    module = make().to(BF16)

    assert not compare_modules(module, replaced(module, forward), recorded(module, sample(BF16)))


def test_a_difference_below_bf16_rounding_is_found_in_float32() -> None:
    """The two forms of GELU are 5e-4 apart, bf16 rounds at 2e-3."""
    module = nn.Sequential(nn.Linear(24, 24), Gelu()).to(BF16)
    other = replaced(module, lambda self, x: F.gelu(self[0](x), approximate="tanh"))

    verdict = compare_modules(module, other, recorded(module, sample(BF16)))

    assert "in float32 with other weights, output" in verdict.reason


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_other_kernels_for_the_same_formula_pass(dtype: torch.dtype) -> None:
    module = RMSNorm().to(dtype)
    other = replaced(module, lambda self, x: F.rms_norm(x, (24,), self.weight, 1e-6))

    verdict = compare_modules(module, other, recorded(module, sample(dtype)))

    assert verdict, verdict.reason
    assert verdict.reason.endswith("1, 30, 0.001, 0")


def test_code_that_rounds_less_than_the_module_passes() -> None:
    class Careless(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    module = Careless(4096).to(BF16)
    other = replaced(module, lambda self, x: F.rms_norm(x, (4096,), self.weight, 1e-6))

    assert compare_modules(module, other, recorded(module, sample(BF16, 4096)))


def test_a_function_is_compared_by_the_gradients_of_the_modules_own_parameters() -> None:
    module = nn.Linear(24, 8)
    call = recorded(module, sample())

    assert compare_modules(module, lambda x: x @ module.weight.t() + module.bias, call)
    wrong = compare_modules(module, lambda x: x @ module.weight.detach().t() + module.bias, call)
    assert "gradient of weight: no gradient flows" in wrong.reason


def test_the_recorded_autocast_is_entered() -> None:
    module = nn.Linear(24, 8)
    call = recorded(module, sample(), autocast=BF16)

    assert compare_modules(module, replaced(module, lambda self, x: F.linear(x, self.weight, self.bias)), call)
    plain = replaced(module, lambda self, x: torch.add(self.bias, (x[..., None, :] * self.weight).sum(-1)))
    assert "is torch.float32, not torch.bfloat16" in compare_modules(module, plain, call).reason


def test_dropout_is_compared_under_the_same_seed() -> None:
    module = nn.Sequential(nn.Linear(24, 24), nn.Dropout(0.5))
    call = recorded(module, sample())
    same = replaced(module, lambda self, x: F.dropout(F.linear(x, self[0].weight, self[0].bias), 0.5))
    without = replaced(module, lambda self, x: self[0](x))

    assert compare_modules(module, same, call)
    assert not compare_modules(module, without, call)


def test_nothing_of_the_module_is_changed() -> None:
    module = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(5), nn.Dropout(0.5))
    call = recorded(module, sample())
    module.eval()
    module[1].train()
    module(sample()).sum().backward()
    before = copy.deepcopy(module.state_dict())
    grads = {name: each.grad for name, each in module.named_parameters()}
    copies = {name: each.clone() for name, each in grads.items() if each is not None}
    modes = [each.training for each in module.modules()]
    random = torch.get_rng_state()

    compare_modules(module, replaced(module, lambda self, x: self[2](self[1](self[0](x)))), call)

    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(each.grad is grads[name] for name, each in module.named_parameters())
    assert all(torch.equal(each, copies[name]) for name, each in grads.items() if each is not None)
    assert [each.training for each in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_a_call_with_a_cache_object_is_rejected() -> None:
    class Cached(nn.Module):
        def forward(self, x: Tensor, cache: object) -> Tensor:
            return x

    module = Cached()
    call = record_calls(module, lambda: module(torch.ones(2), iter(())))[""]

    assert "may keep state" in compare_modules(module, module, call).reason


def test_a_module_that_changes_its_input_is_rejected() -> None:
    module = nn.SiLU(inplace=True)
    x = torch.randn(3)
    call = record_calls(module, lambda: module(x))[""]

    assert "changes its input 0 in place" in compare_modules(module, nn.SiLU(), call).reason


def test_a_scale_at_which_the_module_overflows_is_left_out() -> None:
    class Exponential(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()

    module = Exponential()
    verdict = compare_modules(module, lambda x: x.exp(), recorded(module, sample()), scales=(1.0, 1000.0))

    assert verdict.reason.endswith("at scales 1")
    alone = compare_modules(module, lambda x: x.exp(), recorded(module, sample()), scales=(1000.0,))
    assert "NaN or infinity at every scale" in alone.reason


class Tiny(nn.Module):
    """Its result in fp16 is mostly lost where the input is small."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x * 1e-2


def test_where_the_module_itself_underflows_the_replacement_may_too() -> None:
    module = Tiny()
    call = recorded(module, sample(torch.float16))

    verdict = compare_modules(module, lambda x: x * (x * 1e-2), call)
    assert verdict, verdict.reason
    assert not compare_modules(module, lambda x: x * (x * 1.1e-2), call)


def test_a_module_that_computes_otherwise_in_float64_is_its_own_reference() -> None:
    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() if x.dtype is torch.float64 else x.cos()

    module = Fickle()
    call = recorded(module, sample())
    assert compare_modules(module, lambda x: x.cos(), call, scales=(1.0, 1e-3))
    assert not compare_modules(module, lambda x: x.sin(), call)
