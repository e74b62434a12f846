import copy
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kpt_lightning.candidates.compile_blocks import compile_blocks, decide_graphs, restore_blocks
from kpt_lightning.candidates.cuda_graphs import GraphedWhereSmall
from kpt_lightning.precision import kernel_sizes

pytestmark = [
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    # Said once by torch while the first passes are recorded.
    pytest.mark.filterwarnings("ignore:Unable to hit fast path of CUDAGraphs:UserWarning"),
]
NAMES = ["blocks.0", "blocks.1", "blocks.2"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.dropout(self.outer(nn.functional.gelu(self.inner(self.norm(x)))))
        return out


class Net(nn.Module):
    def __init__(self, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(3))
        self.checkpointed: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.checkpointed(block, x)
        return x.square().mean()


def net(device: str = "cpu", **settings: float) -> Net:
    torch.manual_seed(0)
    return Net(**settings).to(device)  # type: ignore[arg-type]


def batch(model: nn.Module, seed: int = 0, rows: int = 8) -> Tensor:
    where = next(model.parameters())
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed)).to(where.device)


def graphed(model: nn.Module) -> bool:
    """Whether a pass went through the code that is replayed: only it puts hooks on parameters."""
    return any(each._backward_hooks for each in model.parameters())


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


def not_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def test_small_inputs_in_training_are_replayed_and_undone() -> None:
    model = net()
    exact = copy.deepcopy(model)
    blocks = compile_blocks(model, NAMES, "a", graphs=True)
    for each in (model, exact):
        each(batch(model)).backward()
    assert graphed(model)
    for one, other in zip(exact.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)
    restore_blocks(blocks)
    assert not graphed(model)
    assert all("_compiled_call_impl" not in vars(block) for block in blocks)


def test_large_inputs_are_launched_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_sizes, "LEAST_ELEMENTS", 8 * 32)
    model = net()
    compile_blocks(model, NAMES, "b", graphs=True)
    model(batch(model)).backward()
    assert not graphed(model)
    model(batch(model, rows=7)).backward()
    assert graphed(model)


def test_evaluation_is_not_replayed() -> None:
    model = net()
    compile_blocks(model, NAMES, "c", graphs=True)
    with torch.no_grad():
        model(batch(model))
    assert not graphed(model)


@pytest.mark.parametrize("how", [reentrant, not_reentrant])
def test_checkpointed_passes_are_not_replayed(how: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = net()
    exact = copy.deepcopy(model)
    compile_blocks(model, NAMES, "d", graphs=True)
    model.checkpointed = how
    for each in (model, exact):
        each(batch(model).requires_grad_()).backward()
    assert not graphed(model)
    for one, other in zip(exact.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)


@pytest.mark.parametrize(
    ("kind", "several", "reason"),
    [("cpu", False, "a cpu has none"), ("cuda", True, "not measured with several processes")],
)
def test_graphs_are_declined_with_the_reason(kind: str, several: bool, reason: str) -> None:
    verdict = decide_graphs(kind, several)
    assert not verdict
    assert reason in verdict.reason


def test_one_gpu_may_have_them() -> None:
    assert decide_graphs("cuda", several=False)


def trained(model: Net, steps: int, work: Callable[[Net, int], None]) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        work(model, step)
        optimizer.step()
    return [each.detach().clone() for each in model.parameters()]


def accumulate(model: Net, step: int) -> None:
    for part in range(3):
        model(batch(model, 10 * step + part)).backward()


def two_passes_then_backward(model: Net, step: int) -> None:
    (model(batch(model, step)) + model(batch(model, step + 50))).backward()


def evaluate_between(model: Net, step: int) -> None:
    loss = model(batch(model, step))
    with torch.no_grad():
        model(batch(model, 99))
    loss.backward()
    model.eval()
    with torch.no_grad():
        model(batch(model, 98))
    model.train()


def other_lengths(model: Net, step: int) -> None:
    model(batch(model, step, rows=8 + 4 * (step % 3))).backward()


def freeze_later(model: Net, step: int) -> None:
    model.blocks[1].requires_grad_(step < 3 or step > 5)
    model(batch(model, step)).backward()


def checkpoint_later(model: Net, step: int) -> None:
    model.checkpointed = not_reentrant if step % 2 else lambda block, x: block(x)
    model(batch(model, step).requires_grad_()).backward()


def skip_a_backward(model: Net, step: int) -> None:
    loss = model(batch(model, step))
    if step % 3 != 1:
        loss.backward()


WORKS = [
    accumulate, two_passes_then_backward, evaluate_between, other_lengths, freeze_later, checkpoint_later,
    skip_a_backward,
]  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("work", WORKS)
def test_training_with_graphs_equals_training_without(work: Callable[[Net, int], None]) -> None:
    model = net("cuda")
    plain = copy.deepcopy(model)
    blocks = compile_blocks(model, NAMES, "e", graphs=True)
    found, exact = trained(model, 9, work), trained(plain, 9, work)
    assert graphed(model)
    for one, other in zip(exact, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
    restore_blocks(blocks)


@pytest.mark.cuda
def test_what_a_user_keeps_is_not_overwritten() -> None:
    model = net("cuda")
    compile_blocks(model, NAMES, "f", graphs=True)
    kept: list[tuple[Tensor, Tensor]] = []
    for step in range(6):
        model.zero_grad()
        hidden = model.blocks[0](batch(model, step))
        loss = model.blocks[2](model.blocks[1](hidden)).square().mean()
        loss.backward()
        gradient = model.blocks[0].inner.weight.grad  # type: ignore[union-attr]
        kept += [(value, value.detach().clone()) for value in (hidden, loss, gradient)]
    for value, then in kept:
        torch.testing.assert_close(value, then, rtol=0, atol=0)


@pytest.mark.cuda
def test_dropout_draws_anew_in_each_step() -> None:
    model = net("cuda", dropout=0.5)
    compile_blocks(model, NAMES, "g", graphs=True)
    losses = []
    for _ in range(8):
        loss = model(batch(model))
        loss.backward()
        losses.append(loss.item())
    assert len(set(losses[4:])) == 4


@pytest.mark.cuda
def test_memory_of_graphs_is_freed_when_they_are_undone() -> None:
    model = net("cuda", width=32)
    blocks = compile_blocks(model, NAMES, "h", graphs=True)
    assert all(isinstance(block._compiled_call_impl, GraphedWhereSmall) for block in blocks)
    rows = 2**19
    for seed in range(4):
        model(batch(model, seed, rows)).backward()
    torch.cuda.synchronize()
    held = torch.cuda.memory_reserved()
    restore_blocks(blocks)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held / 4
