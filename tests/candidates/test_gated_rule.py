"""The roles of the layers of a gated MLP are found from what goes through them, whatever they are called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from kpt_lightning.candidates.fused_mlp import gated_rule, why_not_alike
from kpt_lightning.candidates.gated_rule import GatedRule, find_gated, plain_twin, projections
from kpt_lightning.config import Float8Config
from kpt_lightning.precision.convert import convert_to_float8
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.validation.calls import record_calls

BF16 = torch.bfloat16
SIZE = 16
SIZES: dict[str, Any] = {"hidden_size": SIZE, "intermediate_size": 24, "num_attention_heads": 2}


class Mlp(nn.Module):
    """Three layers with names that say nothing, all square."""

    def __init__(self, formula: Callable[..., Any], *, bias: bool = True, wide: int = SIZE) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(wide, SIZE, bias=bias), nn.Linear(SIZE, wide, bias=bias)
        self.c = nn.Linear(SIZE, wide, bias=bias)
        self.formula = formula

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


def recorded(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    x = torch.randn(2, 3, SIZE, dtype=dtype, requires_grad=True)
    return record_calls(module, lambda: module(x))[""]


def llama(act: str) -> nn.Module:
    return LlamaMLP(LlamaConfig(**SIZES, hidden_act=act, mlp_bias=True))


def gemma() -> nn.Module:
    return GemmaMLP(GemmaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"))


KNOWN: dict[str, tuple[Callable[[], nn.Module], tuple[str, str, str, str]]] = {
    "llama": (lambda: llama("silu"), ("gate_proj", "up_proj", "down_proj", "silu")),
    "llama, gelu": (lambda: llama("gelu"), ("gate_proj", "up_proj", "down_proj", "gelu")),
    "llama, relu": (lambda: llama("relu"), ("gate_proj", "up_proj", "down_proj", "relu")),
    "gemma": (gemma, ("gate_proj", "up_proj", "down_proj", "gelu_tanh")),
    "square": (lambda: Mlp(lambda self, x: self.a(self.b(x) * F.silu(self.c(x)))), ("c", "b", "a", "silu")),
    "wide": (lambda: Mlp(lambda self, x: self.a(F.silu(self.b(x)) * self.c(x)), wide=40), ("b", "c", "a", "silu")),
    "glu": (lambda: Mlp(lambda self, x: self.a(torch.sigmoid(self.b(x)) * self.c(x))), ("b", "c", "a", "sigmoid")),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_roles_are_found(name: str, dtype: torch.dtype) -> None:
    make, wanted = KNOWN[name]
    module = make().to(dtype)
    rule = find_gated(module, recorded(module, dtype))

    assert isinstance(rule, GatedRule), rule
    assert (rule.gate, rule.up, rule.down, rule.activation) == wanted
    assert GatedRule(**rule.to_dict()) == rule


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        (lambda self, x: self.a(F.mish(self.b(x)) * self.c(x)), "no activation that is known here fits"),
        (lambda self, x: self.a(F.silu(2 * self.b(x)) * self.c(x)), "no activation that is known here fits"),
        (lambda self, x: self.a(F.silu(self.b(x)) + self.c(x)), "no activation that is known here fits"),
        (lambda self, x: self.a(F.dropout(F.silu(self.b(x)) * self.c(x))), "no activation that is known here fits"),
        (lambda self, x: 2 * self.a(F.silu(self.b(x)) * self.c(x)), "with a third that gives its result"),
        (lambda self, x: self.a(self.b(self.c(x))), "no two of its layers read its input"),
        (lambda self, x: self.a(F.silu(self.b(x)) * self.b(x)), "not called once each"),
        (lambda self, x: (self.a(F.silu(self.b(x)) * self.c(x)), None), "called with 1 arguments"),
    ],
)
def test_another_formula_is_refused(formula: Callable[..., Any], reason: str) -> None:
    module = Mlp(formula)
    found = find_gated(module, recorded(module))

    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (llama("silu"), 3),
        (nn.Linear(4, 4), 0),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), 0),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)), 0),
    ],
)
def test_only_three_linear_layers_look_like_a_gated_mlp(module: nn.Module, count: int) -> None:
    assert len(projections(module)) == count


def test_fp8_layers_are_compared_without_their_rounding() -> None:
    module = Mlp(lambda self, x: self.a(F.silu(self.b(x)) * self.c(x)))
    convert_to_float8(module, ["a", "b", "c"], Float8Config(emulate=True))
    rule = find_gated(module, recorded(module))

    assert isinstance(rule, GatedRule)
    assert type(plain_twin(module).get_submodule("a")) is nn.Linear
    assert type(module.a) is Float8Linear


def test_a_hook_inside_is_a_reason_to_leave_it() -> None:
    module = llama("silu")
    module.gate_proj.register_forward_hook(lambda *_: None)
    assert gated_rule(module, recorded(module)) == "a hook is on its 'gate_proj'"


@pytest.mark.parametrize("changed", [{"gate": "up_proj", "up": "gate_proj"}, {"activation": "gelu_tanh"}])
@pytest.mark.cuda
def test_a_wrong_rule_is_found_by_comparison(changed: dict[str, str]) -> None:
    module = llama("silu").cuda()
    x = torch.randn(2, 3, SIZE, device="cuda", requires_grad=True)
    call = record_calls(module, lambda: module(x))[""]
    rule = gated_rule(module, call)
    assert isinstance(rule, GatedRule)

    assert why_not_alike(module, rule, call) is None
    assert "output" in str(why_not_alike(module, GatedRule(**{**rule.to_dict(), **changed}), call))
