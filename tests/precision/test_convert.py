"""Conversion changes a module's class and nothing else; each layer left alone has its reason."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from kpt_lightning.config import Float8Config
from kpt_lightning.decision import Accepted, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.optimize.rules import on_device
from kpt_lightning.precision.convert import convert_to_float8, decide_layers, float8_available, restore_linear
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.precision.gemm import count_gemms

ANY = Float8Config(emulate=True, only_where_it_pays=False)


def config(**settings: Any) -> Float8Config:
    return Float8Config.model_validate({"emulate": True, "only_where_it_pays": False} | settings)


def convert(model: nn.Module, chosen: Float8Config = ANY) -> list[nn.Linear]:
    return convert_to_float8(model, [layer.subject for layer in decide_layers(model, chosen) if layer], chosen)


def reasons(model: nn.Module, chosen: Float8Config = ANY) -> dict[str, str]:
    return {layer.subject: layer.reason for layer in decide_layers(model, chosen) if not layer}


class Tower(nn.Module):
    """Two layers that the user also holds by an attribute and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.again = self.down
        self.held = [self.up, self.down]

    def forward(self, x: Tensor) -> Tensor:
        return self.held[1](self.held[0](x).relu())


def test_module_parameters_keys_and_values_stay_the_same_objects() -> None:
    model = Tower()
    modules, parameters = list(model.modules()), list(model.parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert [type(layer) for layer in convert(model)] == [Float8Linear, Float8Linear]
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.again is model.held[1]
    with count_gemms() as counts:
        model(torch.randn(16, 32))
    assert counts.of_role("output") == 2


def test_hooks_still_fire_on_converted_layers() -> None:
    model, seen = Tower(), []
    model.up.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.up.register_forward_hook(lambda *_: seen.append("forward"))
    model.up.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.up.weight.register_hook(lambda _: seen.append("weight"))
    convert(model)
    model(torch.randn(16, 32, requires_grad=True)).sum().backward()
    assert sorted(seen) == ["backward", "forward", "pre", "weight"]


def test_an_optimizer_made_before_conversion_keeps_training() -> None:
    torch.manual_seed(0)
    model = Tower()
    model.up.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    convert(model)
    x, target = torch.randn(64, 32), torch.randn(64, 32)
    frozen = model.up.bias.clone()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(model.up.bias, frozen)
    assert model.up.bias.grad is None


def test_two_linear_layers_with_one_weight_are_both_converted_and_share_its_gradient() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    assert len(convert(model)) == 2
    assert model[0].weight is model[1].weight
    model(torch.randn(16, 64)).sum().backward()
    assert model[0].weight.grad is model[1].weight.grad


def test_a_copy_a_pickle_and_a_state_dict_give_the_same_numbers() -> None:
    model, x = Tower(), torch.randn(16, 32)
    convert(model)
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = Tower()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    convert(other)
    assert torch.equal(other(x), want)


def test_restoring_leaves_plain_linear_layers_and_no_attribute() -> None:
    model, x = Tower(), torch.randn(16, 32)
    want, before = model(x), [set(vars(layer)) for layer in (model.up, model.down)]
    layers = convert(model)
    assert not torch.equal(model(x), want)
    restore_linear(layers)
    assert [type(layer) for layer in (model.up, model.down)] == [nn.Linear, nn.Linear]
    assert [set(vars(layer)) for layer in (model.up, model.down)] == before
    assert torch.equal(model(x), want)
    restore_linear(layers)  # again: nothing to do


def test_a_model_compiled_before_conversion_runs_the_layers_that_are_there_now() -> None:
    model, x = nn.Sequential(nn.Linear(32, 48)), torch.randn(16, 32)
    compiled = torch.compile(model, backend="eager")
    plain = compiled(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*should not be instantiated")  # torch's own compiler
        layers = convert(model)
        with count_gemms() as counts:
            assert not torch.equal(compiled(x), plain)
    restore_linear(layers)
    assert counts.of_role("output") == 1
    assert torch.equal(compiled(x), plain)


@pytest.mark.parametrize("name", ["1", "5", ""])
def test_a_name_that_is_no_plain_linear_raises_and_converts_nothing(name: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    with pytest.raises(ConfigError, match=r"not nn\.Linear"):
        convert_to_float8(model, ["0", name], ANY)
    assert type(model[0]) is nn.Linear


def test_a_meta_weight_is_converted_and_runs_once_it_has_numbers() -> None:
    model = nn.Sequential(nn.Linear(32, 48, device="meta"))
    assert len(convert(model)) == 1
    model.to_empty(device="cpu")
    nn.init.normal_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    with count_gemms() as counts:
        assert model(torch.randn(4, 32)).isfinite().all()
    assert counts.total == 1


def _replaced_forward() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(32, 32))


def _integer_weight() -> nn.Module:
    layer = nn.Linear(32, 32, bias=False)
    layer.weight = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    return layer


class Wrapped(Tensor):
    """A tensor with behaviour of its own, as quantization libraries have."""


def _tensor_subclass() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.weight = nn.Parameter(torch.randn(32, 32).as_subclass(Wrapped))
    return layer


def _already() -> nn.Module:
    return convert(nn.Sequential(nn.Linear(32, 32)))[0]


ODD_ONES = {
    "attention": (lambda: nn.MultiheadAttention(32, 2), "out_proj", "NonDynamicallyQuantizableLinear is a subclass"),
    "replaced forward": (_replaced_forward, "", "its forward was replaced"),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(32, 32)), "", "ParametrizedLinear is a subclass"),
    "old weight_norm": (_old_weight_norm, "", "its weight is computed"),
    "empty": (lambda: nn.Linear(32, 0), "", "its weight is empty"),
    "integers": (_integer_weight, "", "its weight is torch.int8"),
    "double": (lambda: nn.Linear(32, 32, dtype=torch.float64), "", "its weight is torch.float64"),
    "tensor subclass": (_tensor_subclass, "", "its weight is a Wrapped"),
    "lazy": (lambda: nn.LazyLinear(32), "", "LazyLinear is a subclass"),
    "twice": (_already, "", "runs in FP8 already"),
    "odd sizes": (lambda: nn.Linear(32, 50), "", "sizes must be multiples of 16; float8.odd_dims='pad'"),
}


@pytest.mark.parametrize("name", ODD_ONES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning", "ignore:Lazy modules:UserWarning")
def test_what_cannot_run_in_fp8_is_left_alone_and_says_why(name: str) -> None:
    make, subject, reason = ODD_ONES[name]
    model = nn.ModuleDict({"odd": make(), "plain": nn.Linear(32, 32)})
    classes = [type(each) for each in model.modules()]
    found = reasons(model)
    assert list(found) == [f"odd.{subject}".rstrip(".")]
    assert reason in next(iter(found.values()))
    convert(model)
    changed = [each for each, kind in zip(model.modules(), classes, strict=True) if type(each) is not kind]
    assert changed == [model["plain"]]


def test_a_weight_tied_to_an_embedding_is_left_alone_and_names_it() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "out": nn.Linear(32, 64, bias=False)})
    model["out"].weight = model["embed"].weight
    assert reasons(model) == {"out": "32 -> 64: its weight is tied to 'embed' (Embedding)"}
    assert reasons(model, config(include=["out"])) == {}


def test_transformers_conv1d_is_listed_as_no_linear_layer() -> None:
    from transformers.pytorch_utils import Conv1D

    assert "Conv1D of transformers" in reasons(nn.ModuleDict({"c_attn": Conv1D(96, 32)}))["c_attn"]


def model_of_names() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(32, 32) for name in ("up_proj", "down_proj", "lm_head", "classifier")})


@pytest.mark.parametrize(
    ("settings", "converted"),
    [
        ({}, ["up_proj", "down_proj"]),
        ({"exclude": []}, ["up_proj", "down_proj", "lm_head", "classifier"]),
        ({"exclude": ["down*"]}, ["up_proj", "lm_head", "classifier"]),
        ({"include": ["*_proj"]}, ["up_proj", "down_proj"]),
        ({"include": ["lm_head"]}, ["lm_head"]),
        ({"include": ["*"], "exclude": ["*_proj"]}, ["lm_head", "classifier"]),
        ({"include": ["no such layer"]}, []),
    ],
    ids=str,
)
def test_patterns_choose_layers_and_a_users_exclusion_always_holds(settings: Any, converted: list[str]) -> None:
    decisions = decide_layers(model_of_names(), config(**settings))
    assert [layer.subject for layer in decisions if layer] == converted
    assert [layer.subject for layer in decisions] == ["up_proj", "down_proj", "lm_head", "classifier"]
    for layer in decisions:
        assert layer or "float8.include" in layer.reason or "float8.exclude names it" in layer.reason


@pytest.mark.parametrize(
    ("recipe", "columns", "rows", "pays"),
    [
        ("tensorwise", 4096, 4096, True),
        ("tensorwise", 4096, 1024, False),
        ("tensorwise", 4112, 1024, True),
        ("tensorwise", 8192, 512, False),
        ("tensorwise", 528, 1040, True),
        ("rowwise", 4096, 4096, True),
        ("rowwise", 2048, 4096, False),
        ("rowwise", 2048, 8192, True),
        ("rowwise", 4096, 2048, False),
        ("rowwise", 1024, 8192, False),
        ("rowwise_with_gw_hp", 528, 528, True),
        ("rowwise_with_gw_hp", 512, 8192, False),
    ],
)
def test_layers_too_small_to_pay_are_left_alone_unless_told(recipe: str, columns: int, rows: int, pays: bool) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(columns, rows, device="meta")})
    decision = decide_layers(model, config(recipe=recipe, only_where_it_pays=True))[0]
    assert bool(decision) is pays
    assert decision or "win back quantization" in decision.reason
    assert decide_layers(model, config(recipe=recipe))[0]


def test_odd_sizes_are_padded_where_that_was_asked_for() -> None:
    model = nn.Sequential(nn.Linear(30, 50))
    assert decide_layers(model, config(odd_dims="pad"))[0] == Accepted("0", "30 -> 50")
    convert(model, config(odd_dims="pad"))
    with count_gemms() as counts:
        assert model(torch.randn(5, 30)).shape == (5, 50)
    assert counts.calls == {("output", 16, 64, 32): 1}


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_a_cpu_runs_the_recipe_only_emulated(recipe: str) -> None:
    machine = on_device(detect(), "cpu")
    assert isinstance(float8_available(config(recipe=recipe), machine), Accepted)
    verdict = float8_available(config(recipe=recipe, emulate=False), machine)
    assert isinstance(verdict, Rejected)
    assert machine.host.name in verdict.reason
