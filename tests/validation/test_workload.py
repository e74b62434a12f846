"""How batches are fed, where a loss is found, and what is said where there is none."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kpt_lightning.errors import ConfigError, KptError
from kpt_lightning.validation.workload import ModelOutputError, Workload

X, Y = torch.randn(4, 3), torch.randn(4, 2)


@dataclass
class Output:
    loss: Tensor | None
    hidden: Tensor


class Model(nn.Module):
    """Returns what ``form`` makes of its prediction and its loss."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.form = form

    def forward(self, x: Tensor, y: Tensor = Y) -> Any:
        predicted = self.linear(x)
        return self.form(predicted, F.mse_loss(predicted, y))

    def expected(self) -> Tensor:
        return F.mse_loss(self.linear(X), Y)


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "attribute": lambda p, loss: Output(loss, p),
    "key": lambda p, loss: {"loss": loss, "hidden": p},
    "scalar": lambda p, loss: loss,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("batch", [{"x": X, "y": Y}, (X, Y), [X, Y], X], ids=["mapping", "tuple", "list", "tensor"])
def test_each_form_of_batch_and_of_result_gives_the_loss(form: Callable[..., Any], batch: Any) -> None:
    model = Model(form)
    loss = Workload(model, batch).loss()
    assert torch.equal(loss, model.expected())
    loss.backward()
    assert model.linear.weight.grad is not None


@pytest.mark.parametrize(
    "loss_fn",
    [F.mse_loss, nn.MSELoss(), functools.partial(F.mse_loss, reduction="mean"), lambda m, b: F.mse_loss(m(b[0]), b[1])],
    ids=["function", "module", "partial", "own"],
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "mapping"])
def test_a_torch_loss_gets_prediction_and_target_and_any_other_gets_model_and_batch(
    loss_fn: Callable[..., Any], wrap: Callable[[Tensor], Any]
) -> None:
    model = Model(lambda p, loss: p)
    own = getattr(loss_fn, "__name__", "") == "<lambda>"
    loss, outputs = Workload(model, (X if own else wrap(X), Y), loss_fn).loss_and_outputs()
    assert torch.equal(loss, model.expected())
    assert list(outputs) == ["output"]
    assert torch.equal(outputs["output"], model.linear(X))
    assert not outputs["output"].requires_grad
    assert not model._forward_hooks


def test_an_own_loss_function_may_return_a_mapping_and_call_the_model_twice() -> None:
    model = Model(lambda p, loss: {"hidden": p, "ids": torch.arange(3), "more": [p + 1]})

    def loss_fn(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": model(batch["x"] * 9)["hidden"].sum() + model(batch["x"])["hidden"].sum()}

    work = Workload(model, {"x": X}, loss_fn)
    assert torch.allclose(work.loss(), (model.linear(X * 9) + model.linear(X)).sum())
    outputs = work.outputs()
    assert list(outputs) == ["hidden", "more.0"]
    assert torch.equal(outputs["hidden"], model.linear(X))


def test_a_transformers_output_gives_its_loss_and_its_logits() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    model = LlamaForCausalLM(config)
    ids = torch.arange(12).reshape(2, 6)
    loss, outputs = Workload(model, {"input_ids": ids, "labels": ids}).loss_and_outputs()
    assert torch.equal(loss, model(input_ids=ids, labels=ids).loss)
    assert outputs["logits"].shape == (2, 6, 17)
    with pytest.raises(ModelOutputError, match=r"the \.loss that the model returned is None\. Put the target"):
        Workload(model, {"input_ids": ids}).loss()


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda p, loss: p, r"what the model returned is a tensor of shape \(4, 2\), no scalar loss"),
        (lambda p, loss: (loss, p), "what the model returned is a tuple of 2, no scalar loss"),
        (lambda p, loss: {"logits": p}, "what the model returned is a dict with logits, no scalar loss"),
        (lambda p, loss: {"loss": loss.item()}, "the 'loss' that the model returned is a float, no scalar"),
        (lambda p, loss: {"loss": p.sum(1)}, r"the 'loss' that the model returned is a tensor of shape \(4,\)"),
        (lambda p, loss: None, "what the model returned is None, no scalar loss"),
        (lambda p, loss: loss.detach(), "no gradient flows through what the model returned"),
    ],
)
def test_what_is_no_loss_is_named(form: Callable[..., Any], said: str) -> None:
    with pytest.raises(KptError, match=said):
        Workload(Model(form), X).loss()


def test_without_gradients_around_the_call_the_loss_needs_none() -> None:
    model = Model(lambda p, loss: loss)
    with torch.no_grad():
        assert torch.equal(Workload(model, X).loss(), model.expected())


@pytest.mark.parametrize(
    "batch",
    [None, (x for x in [X]), iter([X]), DataLoader(TensorDataset(X)), TensorDataset(X)],
    ids=["none", "generator", "iterator", "loader", "dataset"],
)
def test_what_gives_batches_is_no_batch(batch: Any) -> None:
    with pytest.raises(ConfigError, match=r"batch=.*Pass one batch, such as next\(iter\(loader\)\)"):
        Workload(Model(FORMS["scalar"]), batch)


@pytest.mark.parametrize("batch", [X, (X, Y, Y), {"x": X, "y": Y}], ids=["tensor", "three", "mapping"])
def test_a_torch_loss_with_a_batch_of_other_than_two_parts_is_refused(batch: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be \(inputs, target\) for mse_loss"):
        Workload(Model(FORMS["scalar"]), batch, F.mse_loss)
