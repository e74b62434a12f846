import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Decision
from kpt_lightning.optimize.engine import Engine


class Block(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.linear, self.breaks = nn.Linear(16, 16), breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x.relu()


class Model(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(breaks) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def proofs(model: Model) -> list[Decision]:
    engine = Engine(KptConfig.build({"precision": "32", "compile": {"blocks": True}}))
    engine.start(model, "cpu")
    engine.step(lambda: model(torch.randn(4, 16)).sum().backward() or True, whole=True)
    engine.stop()
    assert engine.plan is not None
    return engine.plan.explain("whole graphs")


def test_whole_graphs_are_counted_in_step_one() -> None:
    torch._dynamo.reset()
    (proof,) = proofs(Model(breaks=False))
    assert proof
    assert "for 2 modules and what else is compiled, without a break" in proof.reason


def test_graph_breaks_are_reported_and_warned_about() -> None:
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="graph breaks in .* graphs beside 2 modules"):
        (proof,) = proofs(Model(breaks=True))
    assert not proof


def test_blocks_compiled_before_are_proved_by_their_runs() -> None:
    torch._dynamo.reset()
    model = Model(breaks=False)
    proofs(model)
    (proof,) = proofs(model)
    assert proof
    assert proof.reason == "2 runs of graphs for 2 modules, compiled before in this process"


def test_compiled_blocks_that_run_uncompiled_are_found_out() -> None:
    torch._dynamo.reset()
    model = Model(breaks=False)
    proofs(model)
    with torch.compiler.set_stance("force_eager"), pytest.warns(UserWarning, match="ran 0 times for 2 modules"):
        (proof,) = proofs(model)
    assert not proof


@pytest.mark.parametrize("sizes", [(4, 4), (4, 6)])
def test_what_is_compiled_after_the_first_step_is_counted(sizes: tuple[int, int]) -> None:
    torch._dynamo.reset()
    model = Model(breaks=False)
    engine = Engine(KptConfig.build({"precision": "32", "compile": {"blocks": True}}))
    engine.start(model, "cpu")
    for size in sizes:
        engine.step(lambda size=size: model(torch.randn(size, 16)).sum().backward() or True, whole=True)
    engine.stop()
    assert engine.plan is not None
    (proof,) = engine.plan.explain("recompiles")
    assert bool(proof) is (sizes[0] == sizes[1])
