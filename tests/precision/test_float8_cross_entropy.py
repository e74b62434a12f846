"""Head and loss with FP8 GEMMs: near float64 where all is right, and far from it with a planted fault."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kpt_lightning.kernels.linear_cross_entropy import linear_cross_entropy
from kpt_lightning.precision import float8_cross_entropy
from kpt_lightning.precision.float8_cross_entropy import float8_linear_cross_entropy
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.validation.numerics import sqnr_db

# A gradient in e5m2 has 2 bits of mantissa.
LEAST_DB = 15.0
SHAPES = [(64, 32, 96), (75, 40, 203)]


def problem(shape: tuple[int, int, int], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    rows, features, classes = shape
    generator = torch.Generator().manual_seed(sum(shape))
    hidden = torch.randn(rows, features, generator=generator).to(device, torch.bfloat16)
    weight = torch.randn(classes, features, generator=generator).to(device) / features**0.5
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels.to(device)


def db(shape: tuple[int, int, int], device: str = "cpu", **settings: Any) -> dict[str, float]:
    """SQNR of loss and both gradients against float64."""
    hidden, weight, labels = problem(shape, device)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    wanted = F.cross_entropy(F.linear(*exact), labels)
    loss = float8_linear_cross_entropy(hidden, weight, labels, **settings)
    found = torch.autograd.grad(loss, [hidden, weight])
    assert [each.dtype for each in found] == [hidden.dtype, weight.dtype]
    truth = torch.autograd.grad(wanted, exact)
    pairs = zip(("loss", "hidden", "weight"), (wanted, *truth), (loss, *found), strict=True)
    return {name: sqnr_db(one, other) for name, one, other in pairs}


@pytest.mark.parametrize(
    ("device", "emulate"),
    [
        ("cpu", True),
        pytest.param("cuda", True, marks=pytest.mark.sm89),
        pytest.param("cuda", False, marks=pytest.mark.sm89),
    ],
)
@pytest.mark.parametrize("grad_weight", ["fp8", "bf16"])
@pytest.mark.parametrize("chunk_rows", [None, 16, 30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_are_near_those_of_float64(
    shape: tuple[int, int, int], chunk_rows: int | None, grad_weight: Any, device: str, emulate: bool
) -> None:
    found = db(shape, device, chunk_rows=chunk_rows, grad_weight=grad_weight, emulate=emulate)
    assert min(found.values()) >= LEAST_DB, found


@pytest.mark.parametrize("grad_weight", ["fp8", "bf16"])
@pytest.mark.parametrize("role", ["output", "grad_input", "grad_weight"])
def test_a_scale_of_one_gemm_off_by_two_is_seen(
    role: str, grad_weight: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if (role, grad_weight) == ("grad_weight", "bf16"):
        pytest.skip("that GEMM is not in FP8")
    right = float8_cross_entropy.float8_gemm

    def wrong(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **settings: Any) -> Tensor:
        return right(a, b, scale_a * (2 if settings["role"] == role else 1), scale_b, **settings)

    monkeypatch.setattr(float8_cross_entropy, "float8_gemm", wrong)
    found = db(SHAPES[1], grad_weight=grad_weight, emulate=True)
    place = {"output": "hidden", "grad_input": "hidden", "grad_weight": "weight"}[role]
    assert found[place] < LEAST_DB, found


def test_columns_written_to_the_wrong_place_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = float8_cross_entropy.cross_entropy_backward_quantize

    def wrong(*args: Any, offset: int, **settings: Any) -> Any:
        return right(*args, offset=16 * (offset == 0), **settings)

    monkeypatch.setattr(float8_cross_entropy, "cross_entropy_backward_quantize", wrong)
    # What was not written may hold anything, NaN too.
    assert not db(SHAPES[0], chunk_rows=16, emulate=True)["weight"] >= LEAST_DB


@pytest.mark.parametrize(
    ("grad_weight", "roles"),
    [
        ("fp8", {"output": 5, "grad_input": 5, "grad_weight": 1}),
        ("bf16", {"output": 5, "grad_input": 5, "grad_weight": 0}),
    ],
)
def test_every_fp8_gemm_is_counted_in_its_role(grad_weight: Any, roles: dict[str, int]) -> None:
    with count_gemms() as counts:
        db(SHAPES[1], chunk_rows=16, grad_weight=grad_weight, emulate=True)
    assert {role: counts.of_role(role) for role in roles} == roles
    assert counts.emulated == counts.total == sum(roles.values())


def test_a_frozen_weight_costs_no_gemm_of_its_gradient() -> None:
    hidden, weight, labels = problem(SHAPES[0])
    with count_gemms() as counts:
        float8_linear_cross_entropy(hidden, weight.requires_grad_(False), labels, emulate=True).backward()
    assert (counts.of_role("grad_input"), counts.of_role("grad_weight")) == (1, 0)
    assert hidden.grad is not None
    with count_gemms() as counts, torch.no_grad():
        float8_linear_cross_entropy(hidden, weight, labels, emulate=True)
    assert counts.total == counts.of_role("output")


@pytest.mark.parametrize("settings", [{}, dict(reduction="sum", num_items=11)], ids=str)
def test_reduction_and_ignored_rows_are_those_of_the_loss_in_high_precision(settings: dict[str, Any]) -> None:
    hidden, weight, labels = problem(SHAPES[1])
    exact = linear_cross_entropy(hidden.double(), weight.double(), labels, **settings)
    assert sqnr_db(exact, float8_linear_cross_entropy(hidden, weight, labels, emulate=True, **settings)) > 25.0


def test_under_autocast_hidden_states_are_rounded_to_its_dtype() -> None:
    hidden, weight, labels = problem(SHAPES[0])
    wide = hidden.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = float8_linear_cross_entropy(wide, weight, labels, emulate=True)
    assert torch.equal(loss, float8_linear_cross_entropy(hidden, weight, labels, emulate=True))


def test_no_rows_give_nan_and_zero_gradients() -> None:
    hidden, weight, labels = problem((0, 32, 48))
    loss = float8_linear_cross_entropy(hidden, weight, labels, emulate=True)
    assert loss.isnan()
    grad_hidden, grad_weight = torch.autograd.grad(loss, [hidden, weight])
    assert grad_hidden.shape == (0, 32)
    assert not grad_weight.any()


def test_nan_is_not_hidden() -> None:
    hidden, weight, labels = problem(SHAPES[0])
    with torch.no_grad():
        hidden[1, 0] = torch.nan
    loss = float8_linear_cross_entropy(hidden, weight, labels, emulate=True)
    assert loss.isnan()
    assert all(each.isnan().any() for each in torch.autograd.grad(loss, [hidden, weight]))


def test_an_unknown_gemm_of_the_weight_is_refused() -> None:
    hidden, weight, labels = problem(SHAPES[0])
    with pytest.raises(ValueError, match="grad_weight"):
        float8_linear_cross_entropy(hidden, weight, labels, grad_weight="fp4")  # type: ignore[arg-type]
