"""validate_model finds what is wrong, names it, and leaves the model as it was."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kpt_lightning.decision import Rejected
from kpt_lightning.validation.findings import Findings, listed
from kpt_lightning.validation.model import validate_model

X, Y = torch.randn(64, 8), torch.randn(64, 3)


def mlp() -> nn.Sequential:
    """With a batch norm, a dropout and a ReLU."""
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


class Tokens(nn.Module):
    """Integers in, its own loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embed(input_ids))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def faults(found: Findings) -> dict[str, str]:
    return {each.subject: each.reason for each in found.faults}


def test_a_sound_model_passes_every_check() -> None:
    found = validate_model(mlp(), (X, Y), loss_fn=F.mse_loss)
    assert found.ok, found.render()
    assert found["unused parameters"].reason == "each of 6 trainable parameters got a gradient"
    assert float(found["loss"].reason) > 0


def test_a_batch_of_integers_by_name_and_tied_weights_pass() -> None:
    ids = torch.arange(20).reshape(2, 10) % 11
    found = validate_model(Tokens(), {"input_ids": ids, "labels": ids})
    assert found.ok, found.render()
    assert found["shared weights"].reason == "tied: embed.weight = head.weight"


@pytest.mark.parametrize("training", [True, False])
def test_model_gradients_buffers_mode_and_random_state_are_as_before(training: bool) -> None:
    model = mlp().train(training)
    F.mse_loss(model(X), Y).backward()
    model[4].bias.grad = None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: None if each.grad is None else each.grad.clone() for name, each in model.named_parameters()}
    slots = {name: set(vars(module)) for name, module in model.named_modules()}
    random = torch.get_rng_state()
    assert validate_model(model, (X, Y), loss_fn=F.mse_loss, reference=copy.deepcopy(model)).ok
    assert not validate_model(model, (X[:, :5], Y), loss_fn=F.mse_loss).ok
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training is training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, each in model.named_parameters():
        expected = gradients[name]
        assert each.grad is None if expected is None else torch.equal(each.grad, expected), name
    assert {name: set(vars(module)) for name, module in model.named_modules()} == slots
    assert not any(module._forward_hooks for module in model.modules())


class Faulty(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.first, self.relu, self.last, self.spare = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.first(x))
        if self.fault == "error":
            raise LookupError("no such\nexpert")
        if self.fault == "detached":
            hidden = hidden.detach()
        if self.fault == "in place":
            hidden = hidden.exp()
            hidden.add_(1)
        result = self.last(hidden)
        if self.fault == "writes":
            self.last.bias.data = self.last.bias.data + 1
            with torch.no_grad():
                self.last.bias.add_(1)
        if self.fault == "multiplied by zero":
            result = result + 0 * self.spare(result)
        return result


def tuned(fault: str, **weights: float) -> Faulty:
    model = Faulty(fault)
    with torch.no_grad():
        for name, value in weights.items():
            model.get_parameter(name.replace("__", ".")).fill_(value)
    return model


SPARE = "spare.weight, spare.bias got no gradient; spare was not called: use them"

FAULTS: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "unused": (tuned(""), {"unused parameters": SPARE}),
    "detached": (tuned("detached"), {"unused parameters": "first.weight, first.bias, spare.weight and 1 more got"}),
    "zero gradient": (
        tuned("multiplied by zero"),
        {"zero gradients": "spare.weight, spare.bias got a gradient of exactly zero"},
    ),
    "dead relu": (
        tuned("", first__bias=-1e6),
        {
            "dead layers": "relu (ReLU) gave zeros only",
            "zero gradients": "first.weight, first.bias, last.weight got",
            "unused parameters": SPARE,
        },
    ),
    "NaN weight": (
        tuned("", first__bias=math.nan),
        {
            "finite weights": "first.bias (NaN): load",
            "loss": "is nan: the first layer that gave such a value is first (Linear)",
            "finite gradients": "NaN or infinite in first.weight, first.bias, last.weight and 1 more",
            "unused parameters": SPARE,
        },
    ),
    "large": (
        tuned("", last__weight=1e4),
        {"gradient size": "first.weight (", "unused parameters": SPARE},
    ),
    "error": (tuned("error"), {"forward and backward": "in the forward pass: LookupError: no such expert"}),
    "in place": (tuned("in place"), {"forward and backward": "in the backward pass: RuntimeError: one of the var"}),
    "writes": (
        tuned("writes"),
        {"forward and backward": "after the pass: KptError: the model writes to its own parameter 'last.bias'"},
    ),
}


@pytest.mark.parametrize(("model", "expected"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_found_and_named_and_no_other(model: nn.Module, expected: dict[str, str]) -> None:
    found = faults(validate_model(model, (X, Y), loss_fn=F.mse_loss))
    assert found.keys() == expected.keys()
    for subject, start in expected.items():
        assert found[subject].startswith(start), found[subject]


def test_gradients_behind_weights_that_begin_at_zero_are_told_and_not_rejected() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), LoraConfig(r=2, target_modules=["0"]))
    found = validate_model(model, (X, Y), loss_fn=lambda m, b: F.mse_loss(m.base_model(b[0]), b[1]))
    assert found.ok, found.render()
    assert "lora_A" in found["zero gradients"].reason
    assert "look again then" in found["zero gradients"].reason


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((x for x in [X]), "ConfigError: batch='generator': is no batch. Pass one batch"),
        (DataLoader([(X[0], Y[0])]), "ConfigError: batch='DataLoader': gives batches"),
        ((X, Y, Y), "ConfigError: batch='a tuple of 3': must be (inputs, target)"),
        ((X[:0], Y[:0]), "all its tensors are empty"),
        ((X.to("meta"), Y), "on meta, and the model on cpu: move it there"),
    ],
    ids=["generator", "loader", "three", "empty", "device"],
)
def test_a_batch_that_is_none_is_a_finding(batch: Any, said: str) -> None:
    found = validate_model(mlp(), batch, loss_fn=F.mse_loss)
    assert faults(found).keys() == {"batch"}
    assert found["batch"].reason.startswith(said)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (X, "in the forward pass: ModelOutputError: what the model returned is a tensor of shape (64, 3), no scalar"),
        ((X, Y), "in the forward pass: TypeError: "),
        ({"x": X}, "in the forward pass: TypeError: "),
        (X[:, :3], "in the forward pass: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
    ids=["no scalar", "two arguments", "name", "shape"],
)
def test_a_batch_that_cannot_run_is_a_finding_with_the_text_of_the_error(batch: Any, said: str) -> None:
    found = validate_model(mlp(), batch)
    assert faults(found).keys() == {"forward and backward"}
    assert found["forward and backward"].reason.startswith(said)


def test_a_model_without_data_is_not_run() -> None:
    found = validate_model(nn.Sequential(nn.LazyLinear(3)), (X, Y), loss_fn=F.mse_loss)
    assert faults(found).keys() == {"data"}
    assert "forward and backward" not in {each.subject for each in found}


def test_a_sum_for_a_mean_is_found_by_the_limit_that_is_given() -> None:
    model = mlp()
    assert not validate_model(model, (X, Y), loss_fn=F.mse_loss, gradient_limit=1e-3)["gradient size"]
    with pytest.raises(KeyError):
        validate_model(model)["gradient size"]


def test_ctrl_c_in_a_pass_stops_and_leaves_the_model_as_before() -> None:
    model = mlp()
    model[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = model[1].num_batches_tracked.clone()
    with pytest.raises(KeyboardInterrupt):
        validate_model(model, (X, Y), loss_fn=F.mse_loss)
    assert torch.equal(model[1].num_batches_tracked, before)
    assert [len(each._forward_hooks) for each in model] == [0, 0, 1, 0, 0]


def test_layers_inside_a_compiled_module_get_no_hook() -> None:
    model = mlp()
    model[4].compile(backend="eager")
    model.add_module("block", nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    model.block.compile(backend="eager")
    found = validate_model(model, (X, Y), loss_fn=F.mse_loss)
    assert found.ok, found.render()
    assert found["dead layers"].reason.startswith("none of 4 layers")


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_transformers_model_passes_under_autocast_and_without_beside_its_copy(device: str, autocast: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = LlamaForCausalLM(config).to(device)
    ids = torch.randint(32, (2, 16), device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        found = validate_model(model, {"input_ids": ids, "labels": ids}, reference=copy.deepcopy(model))
    assert found.ok, found.render()
    assert found["devices"].reason.startswith(f"all on {device}")
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.cuda
def test_a_batch_left_on_the_host_is_named_and_random_numbers_of_the_device_are_as_before() -> None:
    model = mlp().cuda()
    found = validate_model(model, (X, Y), loss_fn=F.mse_loss)
    assert found["batch"].reason == "on cpu, and the model on cuda:0: move it there, such as tensor.to('cuda:0')"
    before = torch.cuda.get_rng_state()
    assert validate_model(model, (X.cuda(), Y.cuda()), loss_fn=F.mse_loss).ok
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_findings_render_and_store_what_was_found() -> None:
    found = validate_model(nn.ReLU())
    assert not found.ok
    assert [each.subject for each in found.faults] == ["trainable"]
    assert found.render().splitlines()[4].startswith("FAULT  trainable: the model has no parameter")
    assert found.to_dict()["findings"][4] == {
        "subject": "trainable",
        "accepted": False,
        "reason": found["trainable"].reason,
    }
    assert Findings((Rejected("a", "b"),)).to_dict()["ok"] is False
    assert listed("abcde") == "a, b, c and 2 more"
