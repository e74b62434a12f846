"""Two models that should compute the same do, or the figure that says otherwise is given."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpt_lightning.decision import Decision
from kpt_lightning.validation.gates import Numerics
from kpt_lightning.validation.model import validate_model

X, Y = torch.randn(32, 8), torch.randn(32, 3)


class Block(nn.Module):
    """A pre-norm MLP, and faults that one may build into it."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 3)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-2 if self.fault == "epsilon" else self.norm.eps
        x = F.layer_norm(x, (8,), self.norm.weight, self.norm.bias, eps)
        if self.fault == "other order":
            x = (x[:, :4] @ self.up.weight[:, :4].T + x[:, 4:] @ self.up.weight[:, 4:].T) + self.up.bias
        else:
            x = F.linear(x, self.up.weight, None if self.fault == "bias" else self.up.bias)
        x = F.gelu(x, approximate="tanh" if self.fault == "approximation" else "none")
        if self.fault == "backward":
            x = x + 0.01 * (x - x.detach())
        return self.down(self.dropout(x))


def parity(model: nn.Module, reference: nn.Module, numerics: Numerics = Numerics.ROUNDING) -> Decision:
    return validate_model(model, (X, Y), loss_fn=F.mse_loss, reference=reference, numerics=numerics)["parity"]


@pytest.mark.parametrize("fault", ["", "other order"])
def test_the_same_function_in_another_order_of_sums_passes(fault: str) -> None:
    reference = Block()
    model = Block(fault)
    model.load_state_dict(reference.state_dict())
    assert parity(model, reference)


@pytest.mark.parametrize(
    ("fault", "figure"),
    [("epsilon", "loss"), ("bias", "loss"), ("approximation", "loss"), ("backward", "gradient of norm.weight")],
)
def test_a_fault_is_rejected_with_its_figure(fault: str, figure: str) -> None:
    reference = Block()
    model = Block(fault)
    model.load_state_dict(reference.state_dict())
    nn.init.ones_(model.up.bias)
    nn.init.ones_(reference.up.bias)
    decision = parity(model, reference)
    assert not decision
    assert decision.reason.startswith((figure, "up.bias differ")), decision.reason
    assert " dB, and " in decision.reason or "differ in whether" in decision.reason


def test_fewer_bits_pass_as_precision_and_not_as_rounding() -> None:
    reference = Block()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    assert not parity(model, reference)
    assert parity(model, reference, Numerics.PRECISION)


def test_a_model_in_bf16_is_judged_by_the_rounding_of_bf16() -> None:
    torch.manual_seed(0)
    reference = Block()
    model = copy.deepcopy(reference).bfloat16()

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        dtype = next(module.parameters()).dtype
        return F.mse_loss(module(batch[0].to(dtype)).float(), batch[1])

    found = validate_model(model, (X, Y), loss_fn=loss_fn, reference=reference)
    assert found["parity"], found["parity"].reason


def test_parameters_of_one_side_alone_are_told_and_no_common_one_is_rejected() -> None:
    reference = Block()
    model = copy.deepcopy(reference)
    model.up.requires_grad_(False)
    found = validate_model(model, (X, Y), loss_fn=F.mse_loss, reference=reference)
    assert found.ok, found.render()
    assert found["parity of names"].reason.endswith("trainable in one alone: up.bias, up.weight")
    wrapped = nn.Sequential(copy.deepcopy(reference))
    found = validate_model(wrapped, (X, Y), loss_fn=F.mse_loss, reference=reference)
    assert not found["parity of names"]
    assert found["parity"]


def test_a_difference_of_mode_or_dropout_is_hinted_at() -> None:
    reference = Block()
    reference.dropout.p = 0.5
    model = copy.deepcopy(reference).eval()
    assert parity(model, reference).reason.endswith("one is in train mode and the other in eval mode: set both alike")
    model.train()
    assert parity(model, reference)
    model.dropout.p = 0.1
    assert parity(model, reference).reason.endswith("compare in eval mode")


def test_a_reference_that_cannot_run_or_no_batch_is_a_finding() -> None:
    reason = parity(Block(), nn.Linear(5, 3)).reason
    assert reason.startswith("the reference does not run: RuntimeError: mat1 and mat2")
    assert not validate_model(Block(), reference=Block())["parity"]
    unfit = validate_model(nn.Linear(5, 3), (X, Y), loss_fn=F.mse_loss, reference=Block())
    assert [each.subject for each in unfit.faults] == ["forward and backward"]
