"""What is found in parameters and buffers alone."""

import math

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.decision import Decision
from kpt_lightning.validation.weights import check_weights, extremes

CHECKS = ["data", "finite weights", "devices", "dtypes", "trainable", "shared weights"]


def found(model: nn.Module) -> dict[str, Decision]:
    decisions = {each.subject: each for each in check_weights(model)}
    assert list(decisions) == CHECKS
    return decisions


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def test_a_sound_model_has_no_fault_and_its_facts_are_told() -> None:
    decisions = found(model())
    assert all(decisions.values())
    assert decisions["data"].reason == "92 parameters in 6 tensors hold data"
    assert decisions["devices"].reason == "all on cpu"
    assert decisions["dtypes"].reason == "all float32"
    assert decisions["trainable"].reason == "all 6 parameters"


@pytest.mark.parametrize("name", ["0.weight", "3.bias", "1.running_var"])
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "infinite")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_value_that_is_not_finite_is_named(name: str, value: float, kind: str, dtype: torch.dtype) -> None:
    broken = model().to(dtype)
    broken.state_dict()[name].view(-1)[-1] = value
    decision = found(broken)["finite weights"]
    assert not decision
    assert decision.reason.startswith(f"{name} ({kind}): ")


def test_a_mask_of_minus_infinity_in_a_buffer_is_told_and_in_a_parameter_rejected() -> None:
    masked = model()
    masked.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    decision = found(masked)["finite weights"]
    assert decision
    assert "mask hold -inf" in decision.reason
    with torch.no_grad():
        masked[0].weight[0, 0] = -math.inf
    assert not found(masked)["finite weights"]


def test_weights_without_data_are_rejected_and_the_rest_is_still_checked() -> None:
    with torch.device("meta"):
        absent = nn.Linear(4, 8)
    decisions = found(nn.Sequential(absent, nn.Linear(8, 4)))
    assert not decisions["data"]
    assert decisions["data"].reason.startswith("0.weight, 0.bias are on the meta device")
    assert decisions["devices"].reason == "all on cpu"


def test_a_lazy_layer_must_run_first() -> None:
    decisions = found(nn.Sequential(nn.LazyLinear(3)))
    assert not decisions["data"]
    assert "0.weight, 0.bias have no shape yet" in decisions["data"].reason


def test_a_module_of_two_dtypes_and_a_stray_float64_are_rejected_and_a_mix_by_module_is_told() -> None:
    one = model()
    one[0].weight.data = one[0].weight.data.bfloat16()
    assert found(one)["dtypes"].reason.startswith("one module with two dtypes: 0 (bfloat16 and float32)")
    two = model()
    two[3].double()
    assert not found(two)["dtypes"]
    assert found(two)["dtypes"].reason.startswith("float32, but float64 in 3: ")
    three = model().bfloat16()
    three[1].float()
    assert found(three)["dtypes"]
    assert found(three)["dtypes"].reason == "bfloat16, but float32 in 1"


def test_frozen_parameters_are_told_and_nothing_to_train_is_rejected() -> None:
    some = model()
    some[0].requires_grad_(False)
    assert found(some)["trainable"].reason == "2 of 6 are frozen: 0.weight, 0.bias"
    assert not found(some.requires_grad_(False))["trainable"]
    assert not found(nn.ReLU())["trainable"]


def test_tied_weights_are_told_and_two_parameters_in_one_memory_rejected() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert found(tied)["shared weights"].reason == "tied: 0.weight = 1.weight"
    tied[1].weight = nn.Parameter(tied[0].weight.data)
    assert not found(tied)["shared weights"]
    assert found(tied)["shared weights"].reason.startswith("0.weight and 1.weight are different Parameters")


@pytest.mark.cuda
def test_a_layer_left_on_another_device_is_named() -> None:
    mixed = model()
    mixed[3].cuda()
    decision = found(mixed)["devices"]
    assert not decision
    assert decision.reason.startswith(
        "on cpu, but 3.weight, 3.bias on cuda:0: move the whole model with model.to('cpu'"
    )


@pytest.mark.parametrize(
    ("tensor", "ends"),
    [
        (torch.tensor([1.0, -2.0]), (-2.0, 1.0)),
        (torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn), (-2.0, 1.0)),
        (torch.tensor([1 - 3j]), (-3.0, 1.0)),
        (torch.tensor([[0.0, 4.0]]).to_sparse(), (4.0, 4.0)),
        (torch.tensor([1, 2]), None),
        (torch.empty(0), None),
    ],
    ids=["float", "float8", "complex", "sparse", "integer", "empty"],
)
def test_the_extremes_of_every_kind_of_tensor(tensor: Tensor, ends: tuple[float, float] | None) -> None:
    assert extremes(tensor) == ends
