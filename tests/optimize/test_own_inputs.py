"""Inputs that come with a model: what a plan by rules can look at before there is a batch."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from kpt_lightning.decision import Rejected
from kpt_lightning.optimize.own_inputs import own_inputs

CPU = torch.device("cpu")


class Plain(LightningModule):
    def __init__(self, example: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.example_input_array = example
        self.given: list[Any] = []

    def forward(self, x: Tensor, *, twice: Tensor | None = None) -> Tensor:
        self.given.append((x, twice))
        out: Tensor = self.layer(x)
        return out


def looked(model: nn.Module) -> Callable[[], Tensor]:
    run = own_inputs(model, CPU, nullcontext)
    assert not isinstance(run, Rejected), run.reason
    return run


@pytest.mark.parametrize(
    ("example", "given"),
    [
        (torch.ones(3, 4), (torch.ones(3, 4), None)),
        ((torch.ones(3, 4),), (torch.ones(3, 4), None)),
        ({"x": torch.ones(3, 4), "twice": torch.zeros(1)}, (torch.ones(3, 4), torch.zeros(1))),
    ],
    ids=["tensor", "tuple", "dict"],
)
def test_a_module_of_lightnings_is_called_with_its_example(example: Any, given: tuple[Tensor, Tensor | None]) -> None:
    model = Plain(example)
    loss = looked(model)()
    loss.backward()
    assert loss.ndim == 0
    assert model.layer.weight.grad is not None
    torch.testing.assert_close(model.given[0], given)


def test_a_transformers_model_inside_wins_over_an_example() -> None:
    class Both(Plain):
        def __init__(self) -> None:
            super().__init__(torch.ones(3, 4))
            sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
            self.network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))

    model = Both()
    loss = looked(model)()
    assert 3 < float(loss.detach()) < 5.5  # near log(64), the loss of a model that knows nothing
    assert not model.given


def test_a_model_without_either_is_told_with_what_would_help() -> None:
    found = own_inputs(Plain(None), CPU, nullcontext)
    assert isinstance(found, Rejected)
    assert "no example_input_array; a trial has a batch" in found.reason
