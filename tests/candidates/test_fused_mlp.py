"""Gated MLPs by Liger's kernel: the same numbers, and nothing is written over that somebody still needs."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.fused_mlp import CANDIDATE
from kpt_lightning.candidates.liger import liger_gelu_mul, liger_silu_mul
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Float8Config, KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError, MissingDependencyError
from kpt_lightning.hardware import detect
from kpt_lightning.optional import LIGER
from kpt_lightning.precision.convert import convert_to_float8
from kpt_lightning.validation.calls import record_calls
from kpt_lightning.validation.numerics import relative_error

BF16 = torch.bfloat16
SIZE = 32

liger = [
    pytest.mark.cuda,
    pytest.mark.skipif(not LIGER.available(), reason=LIGER.available().reason),
]


class Block(nn.Module):
    def __init__(self, act: str) -> None:
        super().__init__()
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=SIZE, intermediate_size=48, hidden_act=act))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def network(act: str = "silu", device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), Block(act), Block(act)).to(device)


def data(net: nn.Module) -> Tensor:
    x = torch.randn(4, 8, SIZE, generator=torch.Generator().manual_seed(1))
    return x.to(next(net.parameters()))


def subject(net: nn.Module, autocast: torch.dtype | None = None) -> Subject:
    device = next(net.parameters()).device
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        calls = record_calls(net, lambda: net(data(net)))
    return Subject(model=net, profile=detect(), config=KptConfig(), device=device, calls=calls)


def results(net: nn.Module, autocast: torch.dtype | None = None) -> list[Tensor]:
    with torch.autocast(next(net.parameters()).device.type, dtype=autocast, enabled=autocast is not None):
        loss = net(data(net)).float().square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, [each for each in net.parameters() if each.requires_grad])]


def change_of(sub: Subject) -> Change:
    (change,) = CANDIDATE.applies(sub)
    assert isinstance(change, Change), change
    return change


def close(one: list[Tensor], other: list[Tensor], limit: float) -> bool:
    return all(relative_error(a, b) < limit for a, b in zip(one, other, strict=True))


def facts(net: nn.Module) -> list[Any]:
    return [(type(each), list(vars(each)), [id(value) for value in vars(each).values()]) for each in net.modules()]


def marked(test: Any) -> Any:
    for mark in liger:
        test = mark(test)
    return test


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (network(), "2 LlamaMLP such as '1.mlp': a gated MLP; Liger's kernels are Triton's, for CUDA"),
        (network("gelu"), "a gated MLP with activation gelu; Liger has silu and gelu_tanh"),
        (nn.Sequential(nn.Linear(SIZE, 8), nn.Linear(8, SIZE)), "no module has three linear layers"),
    ],
)
def test_on_a_cpu_it_says_what_it_found_and_why_it_stays(net: nn.Module, reason: str) -> None:
    before = facts(net)
    (only,) = CANDIDATE.applies(subject(net))

    assert isinstance(only, Rejected)
    assert reason in only.reason
    assert facts(net) == before


@pytest.mark.skipif(bool(LIGER.available()), reason="Liger is installed")
def test_a_plan_that_needs_liger_says_how_to_get_it() -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install 'kpt-lightning\[kernels\]'"):
        CANDIDATE.apply(subject(network()), {"groups": []})


@marked
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(("dtype", "autocast", "limit"), [
    (torch.float32, None, 1e-4), (torch.float32, BF16, 5e-2), (BF16, None, 5e-2),
])  # fmt: skip
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_loss_and_gradients_stay_and_undo_leaves_no_trace(
    act: str, dtype: torch.dtype, autocast: torch.dtype | None, limit: float, compiled: bool
) -> None:
    net = network(act, "cuda").to(dtype)
    before, plain = facts(net), results(net, autocast)
    sub = subject(net, autocast)
    change = change_of(sub)
    assert facts(net) == before

    done = CANDIDATE.apply(sub, json.loads(json.dumps(change.setting)))
    if compiled:
        for block in net[1:]:
            block.compile(fullgraph=True)
    assert close(plain, results(net, autocast), limit)
    for block in net[1:]:
        vars(block).pop("_compiled_call_impl", None)
    CANDIDATE.undo(sub, done)
    assert facts(net) == before
    torch._dynamo.reset()


@marked
def test_it_works_with_fp8_layers_checkpointing_and_deep_copies() -> None:
    net = network(device="cuda").to(BF16)
    convert_to_float8(net, [f"{block}.mlp.{name}_proj" for block in (1, 2) for name in ("gate", "up", "down")],
                      Float8Config(emulate=True))  # fmt: skip
    plain = results(net)
    sub = subject(net)
    CANDIDATE.apply(sub, change_of(sub).setting)

    # A product that rounds otherwise may fall on the other side of an FP8 step of 6 %.
    assert close(plain, results(net), 0.2)
    assert close(results(net), results(copy.deepcopy(net)), 1e-6)
    x = net[2](checkpoint(net[1], net[0](data(net)), use_reentrant=False))
    found = torch.autograd.grad(x.float().square().mean(), list(net.parameters()))
    assert close(plain[1:], list(found), 0.2)


@marked
@pytest.mark.parametrize("function", [liger_silu_mul, liger_gelu_mul])
def test_a_second_pass_through_a_kept_graph_gives_the_same_gradients(function: Any) -> None:
    gate, up = (torch.randn(8, SIZE, device="cuda", requires_grad=True) for _ in range(2))
    loss = function(2 * gate, 2 * up).square().sum()
    first, second = (torch.autograd.grad(loss, (gate, up), retain_graph=True) for _ in range(2))

    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, gate, create_graph=True)


@marked
def test_a_setting_for_another_model_is_refused_and_changes_nothing() -> None:
    setting = change_of(subject(network(device="cuda"))).setting
    net = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Sequential(), nn.Linear(SIZE, SIZE)).cuda()
    before = facts(net)

    with pytest.raises(ConfigError, match="no such module"):
        CANDIDATE.apply(subject(net), setting)
    assert facts(net) == before
