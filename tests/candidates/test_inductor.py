"""Code compiled under one key is never run under another: the contract with torch's own matching of backends."""

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.candidates.compile_blocks import compile_blocks, restore_blocks
from kpt_lightning.candidates.inductor import Inductor

pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass(frozen=True, slots=True)
class Counted(Inductor):
    """Equal by its key as its parent; runs the graph as it is, and writes down that it was asked to."""

    log: list[str] = field(default_factory=list, compare=False)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.log.append(self.key)
        return graph.forward


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x).relu()
        return out


def test_backends_are_equal_by_key() -> None:
    assert Inductor("a") == Inductor("a")
    assert Inductor("a") != Inductor("b")
    assert hash(Inductor("a")) == hash(Inductor("a"))
    assert pickle.loads(pickle.dumps(Inductor("a"))) == copy.deepcopy(Inductor("a")) == Inductor("a")


def test_code_is_used_again_under_its_key_and_not_under_another() -> None:
    block, x, log = Block(), torch.ones(2, 4), list[str]()
    for key in ("a", "a", "b", "a", "b", "c", "a"):
        # A new object each time, as each application of a plan makes one.
        torch.compile(block, backend=Counted(key, log))(x)
    assert log == ["a", "b", "c"]


def frozen_choice() -> Callable[[Tensor], Tensor]:
    """A function whose compiled code holds a value that dynamo does not look at again."""
    choice = {"scale": 1.0}

    @torch.compiler.assume_constant_result
    def chosen() -> float:
        return choice["scale"]

    def run(x: Tensor) -> Tensor:
        return x * chosen()

    run.choice = choice  # type: ignore[attr-defined]
    return run


def test_what_a_graph_froze_does_not_outlive_the_change_that_made_it() -> None:
    run: Any = frozen_choice()
    x, log = torch.ones(2), list[str]()
    assert torch.compile(run, backend=Counted("", log))(x).tolist() == [1.0, 1.0]
    run.choice["scale"] = 2.0
    # The trap: the same key runs what was compiled before the change.
    assert torch.compile(run, backend=Counted("", log))(x).tolist() == [1.0, 1.0]
    assert torch.compile(run, backend=Counted("doubled", log))(x).tolist() == [2.0, 2.0]
    run.choice["scale"] = 1.0
    assert torch.compile(run, backend=Counted("", log))(x).tolist() == [1.0, 1.0]
    assert torch.compile(run, backend=Counted("doubled", log))(x).tolist() == [2.0, 2.0]
    assert log == ["", "doubled"]


def test_a_hook_that_dynamo_does_not_look_for_is_compiled_under_a_new_key() -> None:
    block, x, log = Block(), torch.ones(2, 4), list[str]()
    plain = torch.compile(block, backend=Counted("", log))(x)
    handle = block.linear.register_forward_hook(lambda module, args, output: output + 1)
    hooked = torch.compile(block, backend=Counted("hooked", log))(x)
    assert torch.allclose(hooked, block(x))
    assert not torch.allclose(hooked, plain)
    handle.remove()
    assert torch.allclose(torch.compile(block, backend=Counted("", log))(x), plain)


def test_blocks_are_compiled_under_the_key_given() -> None:
    model = nn.Sequential(Block(), Block())
    x = torch.ones(2, 4)
    torch._dynamo.utils.counters.clear()
    graphs = []
    for key in ("a", "b", "a"):
        blocks = compile_blocks(model, ["1"], key)
        model(x)
        restore_blocks(blocks)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2]


def test_it_compiles_as_torchs_own_backend_does() -> None:
    block, x = Block(), torch.randn(8, 4)
    results = []
    for backend in ("inductor", Inductor("x")):
        run = torch.compile(block, backend=backend)
        loss = run(x).square().sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, list(block.parameters()))])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_other_sizes_compile_once_more_for_all_sizes_as_with_torchs_own_backend() -> None:
    block, log = Block(), list[str]()
    run = torch.compile(block, backend=Counted("", log))
    for rows in (2, 3, 4, 5):
        run(torch.ones(rows, 4))
    assert len(log) == 2
