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


def test_blocks_compiled_before_prove_nothing_new() -> None:
    torch._dynamo.reset()
    model = Model(breaks=False)
    proofs(model)
    assert proofs(model) == []
