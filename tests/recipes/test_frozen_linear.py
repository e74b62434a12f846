import copy
from typing import Literal

import pytest
import torch
from torch import nn

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.frozen_linear import FrozenLinear

Base = Literal["fp8", "int4"]
BASES = pytest.mark.parametrize("base", ["fp8", "int4"])


def linear(base_seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(base_seed)
        return nn.Linear(128, 96)


@BASES
def test_output_and_gradient_are_those_of_the_dequantized_weight(base: Base) -> None:
    layer = FrozenLinear(linear(), base)
    dense = nn.Linear(128, 96)
    dense.weight.data, dense.bias.data = layer.weight, linear().bias.data
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    one, two = layer(ours), dense(theirs)
    torch.testing.assert_close(one, two)
    one.square().sum().backward()
    two.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("base", "error"), [("fp8", 0.04), ("int4", 0.11)])
def test_weight_is_near_the_original(base: Base, error: float) -> None:
    # e4m3 rounds by at most 1/16; NF4 of normal weights has about 9 % (table of https://arxiv.org/abs/2305.14314).
    original = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    dense = nn.Linear(128, 96)
    dense.weight.data = original
    off = (FrozenLinear(dense, base).weight - original).norm() / original.norm()
    assert 0 < off < error


@pytest.mark.parametrize(("base", "share"), [("fp8", 0.27), ("int4", 0.135)])
def test_nothing_of_full_size_is_kept_for_either_pass(base: Base, share: float) -> None:
    dense = nn.Linear(512, 512, bias=False)
    layer = FrozenLinear(dense, base)
    kept = sum(each.numel() * each.element_size() for each in layer.state_dict().values())
    full = dense.weight.numel() * 4
    assert kept < share * full
    saved = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.ones(1, 512, requires_grad=True))
    assert saved == kept


@BASES
@pytest.mark.parametrize("how", ["to bfloat16", "deepcopy", "state_dict"])
def test_the_weight_survives_bit_for_bit(base: Base, how: str) -> None:
    layer = FrozenLinear(linear(), base)
    before = layer.weight
    if how == "to bfloat16":
        after = copy.deepcopy(layer).to(torch.bfloat16)
    elif how == "deepcopy":
        after = copy.deepcopy(layer)
    else:
        after = FrozenLinear(linear(1), base)
        after.load_state_dict(layer.state_dict())
    assert torch.equal(after.weight, before)


@BASES
def test_autocast_decides_the_dtype(base: Base) -> None:
    layer = FrozenLinear(linear(), base)
    x = torch.ones(2, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@BASES
def test_it_compiles_without_a_graph_break(base: Base) -> None:
    layer = FrozenLinear(linear(), base)
    x = torch.ones(2, 128, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert x.grad is not None


def test_a_weight_that_does_not_fit_the_format_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"base='int4': a weight of \(3, 5\) is no multiple of 64 values. Take 'fp8'"):
        FrozenLinear(nn.Linear(5, 3), "int4")
