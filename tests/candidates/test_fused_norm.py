"""Norms keep their numbers, their parameters and their class name's place in other people's code."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.fused_norm import CANDIDATE
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.optional import LIGER
from kpt_lightning.validation.calls import record_calls
from kpt_lightning.validation.numerics import relative_error

BF16 = torch.bfloat16
SIZE = 32

needs_liger = pytest.mark.skipif(not LIGER.available(), reason=LIGER.available().reason)


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.before, self.after = norm(SIZE), norm(SIZE)
        self.inner = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        # The gradient of the sum goes into both branches: a norm must not write over it.
        return x + self.after(self.inner(self.before(x)))


class WrongBackward(LlamaRMSNorm):
    """Its gradient is another than that of its formula, on purpose."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        return out + 0.5 * (out - out.detach())


def network(norm: Callable[[int], nn.Module] = LlamaRMSNorm, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(SIZE, SIZE), Block(norm), Block(norm), nn.Linear(SIZE, 4)).to(device)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def data(net: nn.Module) -> Tensor:
    x = torch.randn(3, 5, SIZE, generator=torch.Generator().manual_seed(1))
    return x.to(next(net.parameters()))


def subject(net: nn.Module, autocast: torch.dtype | None = None) -> Subject:
    device = next(net.parameters()).device
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        calls = record_calls(net, lambda: net(data(net)))
    return Subject(model=net, profile=detect(), config=KptConfig(), device=device, calls=calls)


def results(net: nn.Module, autocast: torch.dtype | None = None) -> list[Tensor]:
    with torch.autocast(next(net.parameters()).device.type, dtype=autocast, enabled=autocast is not None):
        loss = net(data(net)).float().square().mean()
    wanted = [each for each in net.parameters() if each.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def change_of(sub: Subject, backend: str = "torch") -> Change:
    (change,) = [
        each for each in CANDIDATE.applies(sub) if isinstance(each, Change) and each.setting["backend"] == backend
    ]
    return change


def applied(sub: Subject, backend: str = "torch") -> Any:
    return CANDIDATE.apply(sub, change_of(sub, backend).setting)


def close(one: list[Tensor], other: list[Tensor], limit: float) -> bool:
    return all(relative_error(a, b) < limit for a, b in zip(one, other, strict=True))


def facts(net: nn.Module) -> list[Any]:
    return [(type(each), list(vars(each)), [id(value) for value in vars(each).values()]) for each in net.modules()]


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@pytest.mark.parametrize("norm", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize(("dtype", "autocast", "limit"), [
    (torch.float32, None, 1e-5), (torch.float32, BF16, 5e-2), (BF16, None, 5e-2),
])  # fmt: skip
def test_loss_and_gradients_stay_and_undo_leaves_no_trace(
    norm: Any, dtype: torch.dtype, autocast: torch.dtype | None, limit: float
) -> None:
    net = network(norm).to(dtype)
    before, keys, plain = facts(net), list(net.state_dict()), results(net, autocast)
    sub = subject(net, autocast)

    done = applied(sub)
    assert {type(block.before).__name__ for block in net[1:3]} == {f"Fused{norm.__name__}"}
    assert isinstance(net[1].before, norm)
    assert list(net.state_dict()) == keys
    assert close(plain, results(net, autocast), limit)

    CANDIDATE.undo(sub, done)
    assert facts(net) == before
    assert all(torch.equal(one, other) for one, other in zip(plain, results(net, autocast), strict=True))


def test_the_search_changes_nothing() -> None:
    net = network()
    sub = subject(net)
    before, values = facts(net), copy.deepcopy(net.state_dict())
    CANDIDATE.applies(sub)

    assert facts(net) == before
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())


def test_a_stored_setting_is_all_that_is_needed() -> None:
    net = network(GemmaRMSNorm)
    setting = json.loads(json.dumps(change_of(subject(net)).to_dict()))["setting"]
    other = network(GemmaRMSNorm)
    replayed = Subject(model=other, profile=detect(), config=KptConfig(), device=torch.device("cpu"))

    CANDIDATE.apply(replayed, setting)
    assert close(results(net), results(other), 1e-5)


def test_a_setting_for_another_model_is_refused_and_changes_nothing() -> None:
    setting = change_of(subject(network())).setting
    net = network(nn.LayerNorm)
    before = facts(net)
    replayed = Subject(model=net, profile=detect(), config=KptConfig(), device=torch.device("cpu"))

    with pytest.raises(ConfigError, match="other parameters"):
        CANDIDATE.apply(replayed, setting)
    assert facts(net) == before


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.LayerNorm, "4 LayerNorm such as '1.before': torch's own, one kernel already"),
        (nn.RMSNorm, "4 RMSNorm such as '1.before': torch's own, one kernel already"),
        (WrongBackward, "4 WrongBackward such as '1.before' by torch: gradient of input 0"),
        (lambda size: nn.Identity(), "no module has one or two vectors"),
    ],
)
def test_what_cannot_be_changed_is_told_with_the_reason(norm: Any, reason: str) -> None:
    (only,) = CANDIDATE.applies(subject(network(norm)))

    assert isinstance(only, Rejected)
    assert reason in only.reason


def test_a_plan_without_recorded_calls_proposes_nothing() -> None:
    sub = subject(network())
    sub.calls = {}
    (only,) = CANDIDATE.applies(sub)
    assert "no call of it was recorded" in only.reason


def test_other_sizes_are_groups_of_their_own() -> None:
    net = nn.Sequential(LlamaRMSNorm(SIZE), nn.Linear(SIZE, SIZE), LlamaRMSNorm(SIZE, 1e-5))
    groups = change_of(subject(net)).setting["groups"]

    assert [(group["modules"], group["rule"]["eps"]) for group in groups] == [(["0"], 1e-6), (["2"], 1e-5)]


def test_frozen_norms_pass_the_gradient_on() -> None:
    net = network()
    for block in net[1:3]:
        block.before.requires_grad_(False)
    plain = results(net)
    applied(subject(net))
    assert close(plain, results(net), 1e-5)


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    net = network()
    sub = subject(net)
    done = applied(sub)
    other = copy.deepcopy(net)
    CANDIDATE.undo(sub, done)

    assert type(other[1].before).__name__ == "FusedLlamaRMSNorm"
    assert close(results(net), results(other), 1e-5)


def test_blocks_compile_without_graph_break_and_checkpointing_agrees() -> None:
    net = network()
    plain = results(net)
    applied(subject(net))
    for block in net[1:3]:
        block.compile(backend="aot_eager", fullgraph=True)
    assert close(plain, results(net), 1e-5)

    blocks = [net[0], lambda x: checkpoint(net[1], x, use_reentrant=False), net[2], net[3]]
    x = data(net)
    for block in blocks:
        x = block(x)
    loss = x.square().mean()
    found = torch.autograd.grad(loss, list(net.parameters()))
    assert close(plain[1:], list(found), 1e-5)
    torch._dynamo.reset()


def test_a_module_called_by_name_may_still_be() -> None:
    norm = LlamaRMSNorm(SIZE)
    sub = subject(nn.Sequential(norm))
    applied(sub)
    x = torch.randn(2, SIZE)
    assert torch.allclose(norm(hidden_states=x), F.rms_norm(x, (SIZE,), norm.weight, 1e-6))


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["torch", "kpt", pytest.param("liger", marks=needs_liger)])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize(("dtype", "autocast", "limit"), [
    (torch.float32, None, 1e-4), (torch.float32, BF16, 5e-2), (BF16, None, 5e-2),
])  # fmt: skip
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_loss_and_gradients_stay_on_cuda(
    norm: Any, backend: str, dtype: torch.dtype, autocast: torch.dtype | None, limit: float, compiled: bool
) -> None:
    net = network(norm, "cuda").to(dtype)
    plain = results(net, autocast)
    sub = subject(net, autocast)
    done = applied(sub, backend)
    if compiled:
        for block in net[1:3]:
            block.compile(fullgraph=True)
    assert close(plain, results(net, autocast), limit)
    CANDIDATE.undo(sub, done)
    torch._dynamo.reset()


@pytest.mark.cuda
@needs_liger
def test_ligers_norm_refuses_a_second_derivative() -> None:
    norm = LlamaRMSNorm(SIZE).cuda()
    applied(subject(nn.Sequential(norm)), "liger")
    x = torch.randn(2, SIZE, device="cuda", requires_grad=True)

    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(norm(x).sum(), x, create_graph=True)
