"""The formula of a norm is found from what it computes, whatever it is called."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from kpt_lightning.candidates.norm_rule import NormRule, find_rule, fused_norm, vectors
from kpt_lightning.validation.calls import record_calls

BF16 = torch.bfloat16
SIZE = 24


class Scaled(nn.Module):
    """A norm of the user's: ``formula(x, g, b)``."""

    def __init__(self, formula: Callable[..., Tensor], bias: bool = False, **attributes: float) -> None:
        super().__init__()
        # The bias comes first, so that order alone does not tell the two apart.
        if bias:
            self.shift = nn.Parameter(torch.zeros(SIZE))
        self.scale = nn.Parameter(torch.ones(SIZE))
        self.formula = formula
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True)


def hard_coded(self: Any, x: Tensor) -> Tensor:
    return x / torch.sqrt(mean_square(x) + 1e-8) * self.scale


def with_bias(self: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(mean_square(x) + self.tiny) * self.scale + self.shift


def layer(self: Any, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return self.scale * centered / torch.sqrt(mean_square(centered) + self.tiny) + self.shift


def layer_around_one(self: Any, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return (1 + self.scale) * (centered / torch.sqrt(mean_square(centered) + self.tiny))


def unbiased(self: Any, x: Tensor) -> Tensor:
    return self.scale * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.shift


def length(self: Any, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * self.scale


def odd_epsilon(self: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(mean_square(x) + 3e-7) * self.scale


def epsilon_outside(self: Any, x: Tensor) -> Tensor:
    return x / (mean_square(x).sqrt() + self.tiny) * self.scale


def fused_already(self: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, (SIZE,), self.scale, None, self.tiny)


def rule_of(module: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> NormRule | str:
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        call = record_calls(module, lambda: module(x))[""]
    return find_rule(module, call)


def sample(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)


KNOWN: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (lambda: LlamaRMSNorm(SIZE, 1e-5), {"kind": "rms", "eps": 1e-5, "offset": 0.0, "weight": "weight"}),
    "qwen3": (lambda: Qwen3RMSNorm(SIZE, 2.5e-4), {"kind": "rms", "eps": 2.5e-4, "offset": 0.0}),
    "t5": (lambda: T5LayerNorm(SIZE), {"kind": "rms", "eps": 1e-6, "offset": 0.0}),
    "gemma": (lambda: GemmaRMSNorm(SIZE), {"kind": "rms", "eps": 1e-6, "offset": 1.0}),
    "written out": (lambda: Scaled(hard_coded), {"kind": "rms", "eps": 1e-8, "weight": "scale", "bias": None}),
    "no epsilon": (lambda: Scaled(epsilon_outside, tiny=0.0), {"kind": "rms", "eps": 0.0}),
    "bias": (lambda: Scaled(with_bias, True, tiny=1e-5), {"kind": "rms", "weight": "scale", "bias": "shift"}),
    "layer": (lambda: Scaled(layer, True, tiny=1e-12), {"kind": "layer", "eps": 1e-12, "bias": "shift"}),
    "layer around one": (lambda: Scaled(layer_around_one, tiny=1e-5), {"kind": "layer", "offset": 1.0, "eps": 1e-5}),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_formula_is_found(name: str, dtype: torch.dtype) -> None:
    make, wanted = KNOWN[name]
    rule = rule_of(make().to(dtype), sample(dtype))

    assert isinstance(rule, NormRule), rule
    assert {key: getattr(rule, key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        (unbiased, "neither RMS nor layer norm"),
        (length, "neither RMS nor layer norm"),
        (odd_epsilon, "neither RMS nor layer norm: the closest, rms norm with epsilon"),
        (epsilon_outside, "neither RMS nor layer norm"),
        (fused_already, "it calls layer_norm of torch already"),
        (lambda self, x: (x * self.scale, None), "does not return one tensor"),
        (lambda self, x: (x * self.scale).sum(-1), "does not return one tensor"),
    ],
)
def test_another_formula_is_refused_with_the_closest(formula: Callable[..., Any], reason: str) -> None:
    module = Scaled(formula, bias=formula is unbiased, tiny=0.01)
    found = rule_of(module, sample())

    assert isinstance(found, str)
    assert reason in found


def test_a_weight_over_another_dimension_is_refused() -> None:
    module = Scaled(lambda self, x: x * self.scale[:, None])
    assert "not over the last dimension" in str(rule_of(module, torch.randn(2, SIZE, 5)))


def test_a_module_that_needs_its_own_shape_is_refused() -> None:
    module = Scaled(lambda self, x: (x.reshape(2, 3, SIZE) * self.scale).reshape(x.shape))
    assert "does not run on other input" in str(rule_of(module, torch.randn(6, SIZE)))


@pytest.mark.parametrize("weights", [torch.float32, BF16])
@pytest.mark.parametrize("x", [torch.float32, BF16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm, GemmaRMSNorm])
@pytest.mark.parametrize("autocast", [None, BF16])
def test_the_result_has_the_dtype_of_the_modules_own(
    kind: Any, weights: torch.dtype, x: torch.dtype, autocast: torch.dtype | None
) -> None:
    module = kind(SIZE).to(weights)
    rule = rule_of(module, sample(x), autocast)
    assert isinstance(rule, NormRule)

    for dtype in (torch.float32, BF16):
        assert fused_norm(sample(dtype), module.weight, None, rule).dtype is module(sample(dtype)).dtype


def test_a_small_weight_is_not_rounded_away_next_to_one() -> None:
    module = GemmaRMSNorm(SIZE).to(BF16)
    module.weight.data.fill_(1e-3)
    rule = NormRule(kind="rms", eps=1e-6, offset=1.0, weight="weight", bias=None)
    x = torch.full((1, SIZE), 1.5, dtype=torch.float32)

    assert fused_norm(x, module.weight, None, rule)[0, 0].item() == pytest.approx(1.001, rel=1e-4)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (LlamaRMSNorm(8), ["weight"]),
        (nn.LayerNorm(8), ["weight", "bias"]),
        (nn.BatchNorm1d(8), []),
        (nn.Linear(8, 8), []),
        (nn.Linear(8, 1, bias=False), []),
        (nn.ReLU(), []),
        (nn.Sequential(LlamaRMSNorm(8)), []),
    ],
)
def test_only_vectors_alone_look_like_a_norm(module: nn.Module, names: list[str]) -> None:
    assert vectors(module) == names


def test_a_rule_survives_json() -> None:
    rule = NormRule(kind="rms", eps=1e-6, offset=1.0, weight="weight", bias=None, result="promoted", backend="liger")
    assert NormRule(**rule.to_dict()) == rule


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("result", ["input", "promoted", "weight", "float32"])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_the_packages_own_kernel_computes_what_torchs_does(
    offset: float, result: Any, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 48, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(48, generator=generator).to(weight_dtype).requires_grad_()
    rule = NormRule(kind="rms", eps=1e-6, offset=offset, weight="weight", bias=None, result=result)
    found = [fused_norm(x, weight, None, replace(rule, backend=backend)) for backend in ("torch", "kpt")]
    assert found[0].dtype is found[1].dtype
    limit = 1e-2 if torch.bfloat16 in (dtype, found[0].dtype) else 1e-5
    torch.testing.assert_close(*found, rtol=limit, atol=limit)
    seed = torch.randn(5, 48, generator=generator).to(found[0].dtype)
    one, other = (torch.autograd.grad(each, (x, weight), seed) for each in found)
    torch.testing.assert_close(one, other, rtol=limit, atol=limit)
