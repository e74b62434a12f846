"""FP8 layers by torchao on the Parameters of the layers that are there, in the numerics of ours."""

import copy

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.config import Float8Config
from kpt_lightning.precision.convert import convert_to_float8, decide_layers, restore_linear
from kpt_lightning.precision.float8_linear import Float8Settings
from kpt_lightning.precision.foreign_linear import ForeignLinear, make_foreign
from kpt_lightning.precision.layer_check import check_layers
from kpt_lightning.precision.recipes import RECIPES
from kpt_lightning.validation.numerics import sqnr_db

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'kpt-lightning[kernels]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.sm89)]


def model(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128, bias=False), nn.GELU(), nn.Linear(128, 32)).to(device, torch.bfloat16)


def config(backend: str, recipe: str = "tensorwise", device: str = "cpu") -> Float8Config:
    return Float8Config.model_validate({"backend": backend, "recipe": recipe, "emulate": device == "cpu"})


def results(net: nn.Module, device: str) -> list[Tensor]:
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16).requires_grad_()
    out = net(x)
    out.float().square().mean().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(each.grad for each in net.parameters() if each.grad is not None)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_its_numbers_are_those_of_fp8_as_ours_are(recipe: str, device: str) -> None:
    plain = model(device)
    exact = results(copy.deepcopy(plain), device)
    figures = {}
    for backend in ("native", "torchao"):
        net = copy.deepcopy(plain)
        convert_to_float8(net, ["0", "2"], config(backend, recipe, device))
        found = results(net, device)
        figures[backend] = [sqnr_db(one, other) for one, other in zip(exact, found, strict=True)]
    for ours, theirs in zip(figures["native"], figures["torchao"], strict=True):
        # FP8 is to be seen, and to be as near as ours.
        assert 15 < theirs < 45
        assert abs(ours - theirs) < 3


def test_parameters_names_and_classes_are_as_before_and_after() -> None:
    net = model()
    parameters, names, kinds = dict(net.named_parameters()), list(net.state_dict()), [type(each) for each in net]
    layers = convert_to_float8(net, ["0", "2"], config("torchao"))
    assert all(type(layer) is ForeignLinear for layer in layers)
    assert all(now is parameters[name] for name, now in net.named_parameters())
    assert list(net.state_dict()) == names
    assert [name for name, _ in net.named_modules()] == ["", "0", "1", "2"]
    assert all("already" in each.reason for each in decide_layers(net, config("torchao")))
    restore_linear(layers)
    assert [type(each) for each in net] == kinds
    assert all("foreign" not in vars(each) and "float8" not in vars(each) for each in net)


def test_a_copy_trains_its_own_parameters() -> None:
    net = model()
    convert_to_float8(net, ["0", "2"], config("torchao"))
    other = copy.deepcopy(net)
    results(other, "cpu")
    assert all(each.grad is None for each in net.parameters())
    assert all(each.grad is not None for each in other.parameters())
    with torch.no_grad():
        other[0].weight.zero_()
    assert other(torch.ones(16, 64, dtype=torch.bfloat16)).float().std(0).max() == 0


def test_moved_and_loaded_weights_are_the_ones_that_compute() -> None:
    net = model()
    convert_to_float8(net, ["0", "2"], config("torchao"))
    net.float()
    loaded = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    net.load_state_dict(loaded)
    assert not net(torch.ones(16, 64)).any()


def test_the_check_of_layers_sees_them() -> None:
    net = model().float()
    convert_to_float8(net, ["0", "2"], config("torchao"))
    verdict = check_layers(net, lambda: net(torch.randn(48, 64)).square().mean(), 15.0)
    assert verdict
    assert "2 of 2 looked at" in verdict.reason


def test_it_compiles_without_a_break() -> None:
    net = model().float()
    convert_to_float8(net, ["0", "2"], config("torchao"))
    x = torch.randn(48, 64)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


def test_a_layer_that_makes_its_own_parameters_is_refused_and_nothing_is_changed() -> None:
    layer = nn.Linear(16, 16)
    with pytest.raises(TypeError, match="does not share the Parameters"):
        make_foreign(layer, Float8Settings(RECIPES["tensorwise"], True), copy.deepcopy)
    assert type(layer) is nn.Linear
