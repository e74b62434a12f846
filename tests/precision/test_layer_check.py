"""The check of FP8 layers passes what FP8 rounds, and rejects faults planted in the layers."""

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kpt_lightning.config import Float8Config
from kpt_lightning.precision import float8_linear, layer_check
from kpt_lightning.precision.convert import convert_to_float8
from kpt_lightning.precision.layer_check import ROWS, check_layers
from kpt_lightning.precision.recipes import E4M3, E5M2, RECIPES
from kpt_lightning.validation.gates import Numerics, gate

LEAST = gate(Numerics.PRECISION, torch.bfloat16).layer_db
assert LEAST is not None


class Mlp(nn.Module):
    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        out: Tensor = self.head(input=x)
        return out


def made(recipe: str, width: int = 64, depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = Mlp(width, depth)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    convert_to_float8(model, names, Float8Config.model_validate({"recipe": recipe, "emulate": True}))
    return model


def passes(
    model: nn.Module, rows: int = 128, width: int = 64, autocast: bool = True, scale: float = 1.0
) -> Callable[[], Tensor]:
    x = scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(1))

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x).float().square().mean()  # type: ignore[no-any-return]

    return run


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_real_layers_pass_with_room(recipe: str, autocast: bool) -> None:
    model = made(recipe)
    verdict = check_layers(model, passes(model, autocast=autocast), LEAST + 5)
    assert verdict, verdict.reason
    assert "4 of 4 looked at" in verdict.reason


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("rows", [1, 8, 3 * ROWS])
def test_odd_sizes_and_scales_pass(rows: int, scale: float) -> None:
    model = made("tensorwise", width=48, depth=1)
    verdict = check_layers(model, passes(model, rows, 48, scale=scale), LEAST)
    assert verdict, verdict.reason


def test_a_checkpointed_layer_is_seen() -> None:
    model = made("tensorwise")
    layers: Any = model.layers
    x = torch.randn(32, 64, requires_grad=True)
    verdict = check_layers(layers, lambda: checkpoint(layers[0], x, use_reentrant=False).square().sum(), LEAST)
    assert verdict, verdict.reason
    assert "1 of 3 looked at" in verdict.reason


def test_layers_that_did_not_run_are_no_proof() -> None:
    model = made("tensorwise")
    other = nn.Parameter(torch.ones(1))
    assert not check_layers(model, lambda: other.sum(), LEAST)
    assert not check_layers(nn.Linear(2, 2), lambda: other.sum(), LEAST)


def test_it_leaves_no_hooks() -> None:
    model = made("tensorwise")
    check_layers(model, passes(model), LEAST)

    def fails() -> Tensor:
        raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        check_layers(model, fails, LEAST)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def wrong_scale(factor: float, *dtypes: torch.dtype) -> Callable[[pytest.MonkeyPatch], None]:
    """The scale that undoes a cast is off, for tensors cast to these types."""
    right = float8_linear.to_float8

    def to_float8(x: Tensor, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
        cast, scale = right(x, dtype, **options)
        return cast, scale * (factor if dtype in dtypes else 1.0)

    return lambda patch: patch.setattr(float8_linear, "to_float8", to_float8)


def transposed(patch: pytest.MonkeyPatch) -> None:
    """The layers are square, so that nothing else tells."""
    right = float8_linear._grad_input
    patch.setattr(float8_linear, "_grad_input", lambda grad, weight, s: right(grad, weight.t().contiguous(), s))


def half_a_gradient(patch: pytest.MonkeyPatch) -> None:
    right = float8_linear._grad_weight
    patch.setattr(float8_linear, "_grad_weight", lambda *given: right(*given) / 2)


def old_rows(patch: pytest.MonkeyPatch) -> None:
    right = float8_linear._grad_weight
    patch.setattr(float8_linear, "_grad_weight", lambda grad, x, *more: right(grad, x.roll(1, 0), *more))


def no_gradient(patch: pytest.MonkeyPatch) -> None:
    right = float8_linear._grad_input
    patch.setattr(float8_linear, "_grad_input", lambda *given: torch.zeros_like(right(*given)))


def not_a_number(patch: pytest.MonkeyPatch) -> None:
    right = float8_linear.float8_gemm

    def float8_gemm(*operands: Tensor, **options: Any) -> Tensor:
        out = right(*operands, **options)
        return out * math.nan if options["role"] == "output" else out

    patch.setattr(float8_linear, "float8_gemm", float8_gemm)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize(
    ("plant", "role"),
    [
        (wrong_scale(2.0, E4M3), ""),
        (wrong_scale(0.5, E4M3, E5M2), ""),
        (wrong_scale(1.5, E4M3, E5M2), ""),
        (transposed, "input gradient"),
        (no_gradient, "input gradient"),
        (half_a_gradient, "weight gradient"),
        (old_rows, "weight gradient"),
        (not_a_number, "output"),
    ],
)
def test_a_planted_fault_is_rejected(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], role: str, recipe: str
) -> None:
    model = made(recipe, depth=2)
    plant(monkeypatch)
    verdict = check_layers(model, passes(model), LEAST)
    assert not verdict, verdict.reason
    assert verdict.reason.startswith(role)
    assert verdict.reason.endswith(f"and {LEAST:.1f} are needed")


def test_a_scale_of_gradients_alone_that_is_off_by_two_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("tensorwise", depth=2)
    wrong_scale(2.0, E5M2)(monkeypatch)
    verdict = check_layers(model, passes(model), LEAST)
    assert not verdict
    assert "gradient of" in verdict.reason


@pytest.mark.parametrize("which", [0, 1, 2, 3])
@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0, 1.25])
def test_what_a_layer_gives_is_looked_at_in_every_layer(factor: float, which: int) -> None:
    model = made("tensorwise", depth=4)
    layer = cast(Any, model).layers[which]
    vars(layer)["forward"] = lambda x: factor * type(layer).forward(layer, x)
    verdict = check_layers(model, passes(model), LEAST)
    assert not verdict
    assert f" of layers.{which} has " in verdict.reason


def test_an_input_gradient_is_that_of_the_layer_alone_where_others_read_the_same_tensor() -> None:
    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.q, self.k = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.below(x)
            return self.q(x) * torch.sigmoid(self.k(x)) + x  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Siblings()
    convert_to_float8(model, ["below", "q", "k"], Float8Config(recipe="tensorwise", emulate=True))
    verdict = check_layers(model, passes(model), LEAST + 5)
    assert verdict, verdict.reason
    q = model.q
    vars(q)["forward"] = lambda x: type(q).forward(q, x.detach())
    verdict = check_layers(model, passes(model), LEAST)
    assert not verdict
    assert verdict.reason.startswith("input gradient of q has 0.0 dB")


def test_hooks_of_others_are_no_part_of_the_product() -> None:
    model = made("tensorwise")
    layer = cast(Any, model).layers[1]
    layer.register_forward_hook(lambda module, args, output: output * 3 + 1)
    layer.register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    verdict = check_layers(model, passes(model), LEAST + 5)
    assert verdict, verdict.reason


def test_frozen_weights_have_no_gradient_to_look_at() -> None:
    model = made("tensorwise").requires_grad_(False)
    x = torch.randn(32, 64, requires_grad=True)
    verdict = check_layers(model, lambda: model(x).square().mean(), LEAST + 5)
    assert verdict, verdict.reason
    assert "4 of 4 looked at" in verdict.reason


def test_a_few_rows_are_kept_whatever_the_size_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    right = layer_check._weight_gradient

    def looked(seen: Any, x: Tensor, grad: Tensor) -> None:
        kept.extend([x.untyped_storage().nbytes() // (2 * 64), len(grad)])
        right(seen, x, grad)

    monkeypatch.setattr(layer_check, "_weight_gradient", looked)
    model = made("tensorwise")
    assert check_layers(model, passes(model, rows=10 * ROWS), LEAST)
    assert kept == [ROWS] * 8
