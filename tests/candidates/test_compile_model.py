import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.compile_model import CANDIDATE
from kpt_lightning.candidates.compiled_call import compiled_call
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.validation.calls import record_calls

# torch's advice while it compiles for a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Step(nn.Module):
    """Like a LightningModule: its own forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def subject(model: nn.Module, run: Callable[[], Any], **known: Any) -> Subject:
    device = next(model.parameters()).device
    calls = record_calls(model, run)
    return Subject(model=model, profile=detect(), config=KptConfig(), device=device, calls=calls, **known)


def data(model: nn.Module, seed: int = 1) -> Tensor:
    shape = (2, 3, 8, 8) if isinstance(model, ConvNet) else (4, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).device)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def reason(answer: Any) -> str:
    (only,) = answer
    assert isinstance(only, Rejected)
    return only.reason


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@pytest.mark.parametrize("make", [mlp, ConvNet])
def test_a_model_without_blocks_is_compiled_in_place_with_the_same_numbers_and_undone(make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    x = data(model)
    on = subject(model, lambda: model(x), key="one")
    exact = gradients(model, model(x).square().mean())
    before, keys = sorted(vars(model)), list(model.state_dict())
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change)
    torch._dynamo.utils.counters.clear()
    applied = CANDIDATE.apply(on, Change.from_dict(change.to_dict()).setting)
    for one, other in zip(exact, gradients(model, model(x).square().mean()), strict=True):
        torch.testing.assert_close(one, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(model.state_dict()) == keys
    assert copy.deepcopy(model)._compiled_call_impl is None
    CANDIDATE.undo(on, applied)
    assert (sorted(vars(model)), model._compiled_call_impl) == (before, None)


@pytest.mark.parametrize(
    "make", [mlp, lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)], ids=["mlp", "encoder"]
)
def test_a_module_of_torch_itself_is_traced_through_its_own_frame_and_its_hooks_too(make: Any) -> None:
    model = make()
    model.register_forward_hook(lambda module, args, output: output + 1)
    traced: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    x = torch.randn(2, 4, 8)
    torch.testing.assert_close(compiled_call(model, backend)(x), model(x))
    assert len(traced) == 1


def test_what_a_training_step_calls_is_compiled_where_the_model_itself_is_never_called() -> None:
    model = Step()
    x = data(model)
    on = subject(model, lambda: model.training_step(x))
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change)
    assert change.setting == {"modules": ["net"], "mode": "default"}
    applied = CANDIDATE.apply(on, change.setting)
    assert model.net._compiled_call_impl is not None
    CANDIDATE.undo(on, applied)
    assert model.net._compiled_call_impl is None


def test_repeated_blocks_are_left_to_their_own_candidate() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
    assert "2 repeated blocks" in reason(CANDIDATE.applies(subject(model, lambda: model[0](data(model)))))


def test_what_the_user_compiled_is_left_alone() -> None:
    model = nn.Sequential(mlp(), nn.Linear(4, 4))
    model[0].compile(backend="eager")
    assert "'0' is compiled already" in reason(CANDIDATE.applies(subject(model, lambda: model(data(model)))))
    with pytest.raises(ConfigError, match="compiled already"):
        CANDIDATE.apply(subject(model, lambda: None), {"modules": ["0"], "mode": "default"})


def test_a_transformers_model_is_declined_for_its_dense_mask() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    model = nn.Sequential(transformers.BertModel(config))
    assert "dense mask" in reason(CANDIDATE.applies(subject(model, lambda: None)))


def test_single_layers_and_unknown_calls_are_declined() -> None:
    model = mlp()
    x = data(model)
    assert "no batch" in reason(CANDIDATE.applies(subject(model, lambda: None)))
    assert "single layers" in reason(CANDIDATE.applies(subject(model, lambda: model[2](model[0](x)))))


def test_a_stored_setting_for_another_model_is_refused() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match="not in this model"):
        CANDIDATE.apply(subject(model, lambda: None), {"modules": ["net"], "mode": "default"})


def on_cuda(step_seconds: float | None = None) -> tuple[nn.Module, Subject, Any]:
    torch.manual_seed(0)
    model = mlp().cuda()
    on = subject(model, lambda: model(data(model)), key="graphs", step_seconds=step_seconds)
    return model, on, CANDIDATE.applies(on)


def test_results_are_copied_out_and_the_hooks_for_that_go_again() -> None:
    torch.manual_seed(0)
    model = mlp()
    model[0].requires_grad_(False)
    on = subject(model, lambda: model(data(model)))
    applied = CANDIDATE.apply(on, {"modules": [""], "mode": "reduce-overhead"})
    exact = copy.deepcopy(model)
    for step in range(2):
        if step == 1:
            for each in (model, exact):
                each[0].requires_grad_(True)
        for each in (model, exact):
            each.zero_grad()
            for seed in range(2):
                each(data(each, seed)).square().mean().backward()
        for one, other in zip(exact.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert all(each._backward_hooks for each in model.parameters())
    CANDIDATE.undo(on, applied)
    assert all(each._backward_hooks is None for each in model.parameters())


@pytest.mark.cuda
def test_graphs_are_proposed_where_launches_take_the_time() -> None:
    assert on_cuda(1e-4)[2][1].setting["mode"] == "reduce-overhead"
    assert "the device is busy" in on_cuda(1.0)[2][1].reason


@pytest.mark.cuda
def test_cuda_graphs_keep_outputs_and_accumulated_gradients() -> None:
    model, on, (_, change) = on_cuda()
    exact = copy.deepcopy(model)
    applied = CANDIDATE.apply(on, change.setting)
    for _ in range(4):
        # A loop that accumulates goes forward and backward in turn, and keeps the losses.
        losses: list[list[Tensor]] = [[], []]
        for each, kept in zip((model, exact), losses, strict=True):
            each.zero_grad()
            for seed in range(3):
                kept.append(each(data(each, seed)).square().mean())
                kept[-1].backward()
        torch.testing.assert_close(losses[0], losses[1])
        for one, other in zip(exact.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad)
    CANDIDATE.undo(on, applied)
    assert all(each._backward_hooks is None for each in model.parameters())
    assert model._compiled_call_impl is None


@pytest.mark.cuda
def test_a_parameter_trained_only_later_accumulates_as_well() -> None:
    model, on, (_, change) = on_cuda()
    model[0].requires_grad_(False)
    applied = CANDIDATE.apply(on, change.setting)
    model(data(model)).square().mean().backward()
    model[0].requires_grad_(True)
    model.zero_grad()
    for seed in range(3):
        model(data(model, seed)).square().mean().backward()
    found = [each.grad for each in model.parameters()]
    CANDIDATE.undo(on, applied)
    model.zero_grad()
    for seed in range(3):
        model(data(model, seed)).square().mean().backward()
    for one, other in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)


@pytest.mark.cuda
def test_an_optimizer_trains_with_graphs_as_without() -> None:
    model, on, (_, change) = on_cuda()
    exact = copy.deepcopy(model)
    CANDIDATE.apply(on, change.setting)
    for each in (model, exact):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for seed in range(6):
            optimizer.zero_grad()
            each(data(each, seed)).square().mean().backward()
            optimizer.step()
    for one, other in zip(exact.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
