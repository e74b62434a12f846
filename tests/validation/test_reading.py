"""Readings and distances: what counts as near, and what never does."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from kpt_lightning.validation.gates import Gate, Numerics, gate
from kpt_lightning.validation.reading import SAMPLE, Distance, Reading, distance, judge, read, sample, widest
from kpt_lightning.validation.rounding import rounding_noise

NAN, INF = float("nan"), float("inf")
STRICT = Gate(output_db=100.0, gradient_db=100.0, median_gradient_db=100.0, spreads=4.0)
COARSE = gate(Numerics.PRECISION, torch.bfloat16)


def reading(loss: float = 1.0, output: list[float] | None = None, gradient: list[float] | None = None) -> Reading:
    gradients = {"w": None if gradient is None else torch.tensor(gradient)}
    return Reading(loss, {"logits": torch.tensor([1.0, 2.0] if output is None else output)}, gradients)


def near(*, loss: float = INF, outputs: float = INF, gradient: float = INF, others: tuple[float, ...] = ()) -> Distance:
    gradients = {"w": gradient, **{f"v{number}": value for number, value in enumerate(others)}}
    return Distance(loss, {"logits": outputs}, gradients, ())


def test_equal_readings_are_infinitely_near() -> None:
    same = distance(reading(gradient=[1.0, 2.0]), reading(gradient=[1.0, 2.0]))
    assert (same.loss, same.outputs, same.gradients, same.missing) == (INF, {"logits": INF}, {"w": INF}, ())
    assert judge(same, STRICT, None)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1])
def test_the_figure_is_the_ratio_of_norms_in_decibel(size: float) -> None:
    found = distance(reading(gradient=[3.0, 4.0]), reading(gradient=[3.0, 4.0 + 5.0 * size]))
    assert found.gradients["w"] == pytest.approx(-20 * math.log10(size), abs=0.6)


@pytest.mark.parametrize(
    ("exact", "other", "figure"),
    [
        ([0.0, 0.0], [0.0, 0.0], INF),
        ([0.0, 0.0], [0.0, 1e-20], -INF),
        ([1.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, NAN], [1.0, NAN], INF),
        ([1.0, NAN], [NAN, 1.0], NAN),
        ([1.0, NAN], [1.0, 1.0], NAN),
        ([1.0, 1.0], [1.0, INF], NAN),
        ([1.0, -INF], [1.0, -INF], INF),
        ([1.0, -INF], [1.0, INF], NAN),
        ([1.0, -INF], [1.1, -INF], 20.0),
        ([NAN, NAN], [NAN, NAN], INF),
        ([NAN, INF], [INF, NAN], NAN),
    ],
)
def test_zeros_infinities_and_nans(exact: list[float], other: list[float], figure: float) -> None:
    found = distance(reading(output=exact, gradient=exact), reading(output=other, gradient=other))
    assert found.gradients["w"] == pytest.approx(figure, abs=0.01, nan_ok=True)
    assert found.outputs["logits"] == pytest.approx(figure, abs=0.01, nan_ok=True)


@pytest.mark.parametrize("spreads", [0.0, 4.0])
@pytest.mark.parametrize("what", ["loss", "outputs", "gradient"])
def test_a_figure_that_is_no_number_never_passes(what: str, spreads: float) -> None:
    limits = replace(STRICT, spreads=spreads)
    assert not judge(near(**{what: NAN}), limits, near(loss=60.0, outputs=60.0, gradient=60.0))
    assert not judge(near(**{what: -INF}), limits, near(loss=60.0, outputs=60.0, gradient=60.0))
    # Noise that gave no number widens nothing.
    assert not judge(near(**{what: 60.0}), limits, near(**{what: NAN}))


def test_a_loss_that_became_nan_is_rejected() -> None:
    verdict = judge(distance(reading(gradient=[1.0]), reading(loss=NAN, gradient=[1.0])), COARSE, None)
    assert not verdict
    assert verdict.reason.startswith("loss")


@pytest.mark.parametrize(("one", "two"), [([1.0], None), (None, [1.0]), (None, [0.0])])
def test_a_gradient_in_one_reading_alone_is_told(one: list[float] | None, two: list[float] | None) -> None:
    found = distance(reading(gradient=one), reading(gradient=two))
    assert found.missing == ("w",)
    verdict = judge(found, COARSE, None)
    assert not verdict
    assert verdict.reason == "w differ in whether there is a value"


def test_a_parameter_that_is_new_or_gone_is_told() -> None:
    assert distance(reading(gradient=[1.0]), replace(reading(), gradients={})).missing == ("w",)
    assert distance(replace(reading(), gradients={}), reading(gradient=[1.0])).missing == ("w",)


def test_outputs_of_another_shape_are_told() -> None:
    found = distance(reading(output=[1.0, 2.0]), reading(output=[1.0, 2.0, 3.0]))
    assert found.missing == ("shape of output logits",)
    assert not judge(found, COARSE, None)


def test_an_output_that_a_kernel_leaves_out_is_no_fault() -> None:
    found = distance(reading(gradient=[1.0]), replace(reading(gradient=[1.0]), outputs={}))
    assert found.outputs == {}
    assert judge(found, STRICT, None)


@pytest.mark.parametrize(("value", "kept"), [(99.9, False), (100.0, True)])
@pytest.mark.parametrize("what", ["loss", "outputs", "gradient"])
def test_limits_without_rounding(what: str, value: float, kept: bool) -> None:
    assert bool(judge(near(**{what: value}), STRICT, None)) is kept
    assert bool(judge(near(**{what: value}), replace(STRICT, spreads=0.0), near(**{what: 30.0}))) is kept


@pytest.mark.parametrize(("value", "kept"), [(47.9, False), (48.0, True)])
@pytest.mark.parametrize("what", ["loss", "outputs", "gradient"])
def test_four_spreads_are_12_decibel_below_what_rounding_does(what: str, value: float, kept: bool) -> None:
    own = near(**{what: 60.0 + 20 * math.log10(4) - 12})
    assert bool(judge(near(**{what: value}), STRICT, own)) is kept


def test_a_loss_is_judged_by_the_noise_of_the_outputs_too() -> None:
    # Rounding left the loss alone by chance.
    own = near(loss=INF, outputs=60.0)
    assert judge(near(loss=50.0), STRICT, own)
    assert not judge(near(loss=40.0), STRICT, own)


def outputs(loss: float = INF, **figures: float) -> Distance:
    return Distance(loss, figures, {}, ())


def test_one_noisy_output_widens_neither_the_limit_of_another_nor_that_of_the_loss() -> None:
    own = outputs(loss=110.0, noisy=3.0, a=110.0, b=111.0)
    assert judge(outputs(loss=105.0, noisy=-5.0, a=105.0, b=105.0), STRICT, own)
    for fault in ({"a": 60.0}, {"b": 60.0}, {"loss": 60.0}, {"noisy": -20.0}):
        verdict = judge(outputs(**({"loss": 105.0, "noisy": -5.0, "a": 105.0, "b": 105.0} | fault)), STRICT, own)
        assert not verdict
        assert verdict.reason.startswith("loss has" if "loss" in fault else f"output {next(iter(fault))} has")


@pytest.mark.parametrize("spreads", [0.0, 4.0])
def test_what_noise_takes_from_zero_is_not_judged_and_the_verdict_says_so(spreads: float) -> None:
    limits = replace(STRICT, spreads=spreads)
    own = outputs(loss=110.0, zero=-INF, a=110.0)
    verdict = judge(outputs(loss=110.0, zero=-INF, a=110.0), limits, own)
    assert verdict
    assert verdict.reason.endswith("; not judged: output zero")
    assert "outputs 110.0 dB" in verdict.reason
    assert not judge(outputs(loss=110.0, zero=110.0, a=20.0), limits, own)
    assert not judge(outputs(loss=20.0, zero=110.0, a=110.0), limits, own)
    # NaN is not noise.
    assert not judge(outputs(loss=110.0, zero=NAN, a=110.0), limits, own)


def test_where_nothing_can_be_judged_nothing_passes() -> None:
    verdict = judge(outputs(loss=-INF, zero=-INF), STRICT, outputs(loss=-INF, zero=-INF))
    assert not verdict
    assert "output zero from zero, and nothing else can be judged" in verdict.reason


def test_the_median_gradient_has_a_limit_of_its_own_where_precision_is_changed() -> None:
    low = near(gradient=1.0, others=(2.0, 3.0, 50.0, 60.0))
    assert not judge(low, COARSE, None)
    assert judge(near(gradient=1.0, others=(2.0, 6.0, 50.0, 60.0)), COARSE, None)
    assert "median" in judge(low, COARSE, None).reason


def test_the_widest_of_several_distances_is_the_worst_of_each_figure() -> None:
    one, two = near(loss=50.0, outputs=INF, gradient=NAN), near(loss=60.0, outputs=40.0, gradient=30.0, others=(20.0,))
    found = widest([one, replace(two, missing=("x",))])
    assert (found.loss, found.outputs, found.missing) == (50.0, {"logits": 40.0}, ("x",))
    assert math.isnan(found.gradients["w"])
    assert found.gradients["v0"] == 20.0


def test_the_verdict_names_the_worst() -> None:
    rejected = judge(near(gradient=90.0, others=(120.0, 80.0)), STRICT, None)
    assert rejected.reason == "gradient of w has 90.0 dB, and 100.0 are needed"
    accepted = judge(near(gradient=110.0, others=(120.0, 105.0)), STRICT, None)
    assert "105.0 dB and better (v1)" in accepted.reason


@pytest.mark.parametrize("numel", [1, SAMPLE, SAMPLE + 1, 3 * SAMPLE, 10 * SAMPLE])
def test_a_sample_is_small_and_meets_every_column(numel: int) -> None:
    kept = sample(torch.arange(float(numel)))
    assert kept.numel() <= 2 * SAMPLE
    assert len({int(each) % 8 for each in kept[:64]}) == min(8, numel)


def test_a_sample_is_a_copy_in_full_precision() -> None:
    for dtype, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        tensor = torch.ones(3, dtype=dtype)
        taken = sample(tensor)
        tensor.zero_()
        assert taken.dtype == kept
        assert taken.tolist() == [1.0, 1.0, 1.0]


def test_sparse_and_complex_gradients_are_read() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 2, sparse=True)
            self.wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.table(x) * (self.wave * 1j).imag).sum()

    model = Model()
    found = read(model, lambda: (model(torch.tensor([1, 1])), {}))
    table, wave = found.gradients["table.weight"], found.gradients["wave"]
    assert table is not None
    assert wave is not None
    assert table.reshape(4, 2)[1].tolist() == [2.0, 2.0]
    assert wave.numel() == 4
    assert distance(found, found).worst[1] == INF


def test_reading_leaves_the_model_as_it_was_and_is_repeatable() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    x = torch.randn(8, 4)
    state = torch.get_rng_state()

    def forward() -> tuple[Tensor, dict[str, Tensor]]:
        out = model(x)
        return out.square().sum(), {"out": out}

    first, second, other = read(model, forward), read(model, forward), read(model, forward, seed=1)
    assert distance(first, second).worst[1] == INF
    assert distance(first, other).outputs["out"] < 30
    assert torch.equal(torch.get_rng_state(), state)
    assert model[2].num_batches_tracked == 0
    assert model[0].weight.grad is None


def test_frozen_parameters_are_not_compared() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert list(read(model, lambda: (model(torch.ones(1, 2)).sum(), {})).gradients) == ["weight"]


def bert() -> tuple[nn.Module, Tensor]:
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=200
    )  # fmt: skip
    return BertForMaskedLM(config).eval(), torch.randint(0, 200, (4, 128))


def convolutions() -> tuple[nn.Module, Tensor]:
    # The biases before the norms have no effect.
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(*layers, *head), torch.randn(64, 3, 16, 16)


@pytest.mark.parametrize("make", [bert, convolutions])
def test_gradients_that_are_zero_but_for_rounding_do_not_speak_against_fewer_bits(make: object) -> None:
    assert callable(make)
    torch.manual_seed(0)
    model, batch = make()

    def forward() -> tuple[Tensor, dict[str, Tensor]]:
        out = model(batch)
        out = getattr(out, "logits", out).float()
        target = torch.arange(out[..., 0].numel()) % out.shape[-1]
        return F.cross_entropy(out.reshape(-1, out.shape[-1]), target), {"out": out}

    def in_bf16() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            return forward()

    def reversed_gradient() -> tuple[Tensor, dict[str, Tensor]]:
        loss, outputs = in_bf16()
        return 2 * loss.detach() - loss, outputs

    plain = read(model, forward)
    with rounding_noise(model, torch.float32):
        rounding = distance(plain, read(model, forward))
    changed = distance(plain, read(model, in_bf16))
    assert changed.worst[1] < -30
    assert judge(changed, COARSE, rounding)
    assert not judge(changed, COARSE, None)
    assert not judge(distance(plain, read(model, reversed_gradient)), COARSE, rounding)
