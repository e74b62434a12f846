"""A change to fewer bits may do what noise of their size does to the unchanged model, and no more."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kpt_lightning.candidates.autocast_bf16 import CANDIDATE as AUTOCAST
from kpt_lightning.candidates.candidate import Change
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Float8Config
from kpt_lightning.decision import Accepted, Decision
from kpt_lightning.optimize.apply import applied
from kpt_lightning.optimize.baseline import take_baseline
from kpt_lightning.optimize.fewer_bits import Bits, bits_of, expect
from kpt_lightning.optimize.laboratory import Laboratory
from kpt_lightning.optimize.search import search
from kpt_lightning.optimize.trial import compare
from kpt_lightning.optimize.whole_numbers import compare_whole
from kpt_lightning.precision.convert import convert_to_float8, restore_linear
from kpt_lightning.precision.recipes import RECIPES
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.reading import distance, judge, read
from kpt_lightning.validation.workload import Workload
from tests.optimize.faults import FAULTS, Made, Tiny, batch, subject, with_nap

NAP = 0.06
LAYERS = tuple(f"layers.{number}.{name}" for number in range(2) for name in ("qkv", "out", "up"))
BITS = {
    "bf16": Bits((), 2.0**-8, 2.0**-8),
    "e4m3": Bits(LAYERS, 2.0**-4, 2.0**-4),
    "e5m2 backward": Bits(LAYERS, 2.0**-4, 2.0**-3),
}
# Another epsilon of one norm moves its output by half a per cent, which is a rounding to bf16.
WITHIN = {"wrong_epsilon"}


def verdict_on(model: nn.Module, change: Callable[[nn.Module], Callable[[], None]], bits: Bits | None) -> Decision:
    """``bits`` None: those of the changed model."""
    about, work = subject(model, batch()), Workload(model, batch())
    plain = take_baseline(about, work.loss_and_outputs)
    undo = change(model)
    changed, found = read(model, work.loss_and_outputs), bits_of(about)
    undo()
    expected = expect(model, work.loss_and_outputs, bits or found)
    limits = gate(Numerics.PRECISION, torch.float32)
    return judge(distance(plain.reading, changed), limits, plain.rounding, expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_more_than_noise_of_either_format(fault: str, bits: str) -> None:
    verdict = verdict_on(Tiny(), FAULTS[fault], BITS[bits])
    assert bool(verdict) is (fault in WITHIN), verdict.reason


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - WITHIN))
def test_a_planted_fault_that_is_called_fewer_bits_is_not_kept(fault: str) -> None:
    model = Tiny(nap=NAP)
    made = Made(fault, with_nap(FAULTS[fault]), Numerics.PRECISION)
    outcome = search(subject(model, batch()), Workload(model, batch()), max_seconds=60, pool=[made], rounds=2)
    assert outcome.changes == []
    assert outcome.trials[0].reason.startswith("numbers differ")


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_layers_do_what_noise_of_their_size_does(recipe: str) -> None:
    verdict = verdict_on(Tiny(), partial(converted, recipe=recipe), None)
    assert verdict, verdict.reason


def llama() -> tuple[nn.Module, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **sizes)), tokens()


def gpt2() -> tuple[nn.Module, Any]:
    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config), tokens()


def bert() -> tuple[nn.Module, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=128, **sizes)), tokens()


def vit() -> tuple[nn.Module, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return transformers.ViTForImageClassification(config), {"pixel_values": images, "labels": torch.arange(8)}


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("make", [llama, gpt2, bert, vit])
@pytest.mark.parametrize("seed", range(3))
def test_bf16_autocast_does_what_noise_of_its_size_does(make: Callable[[], tuple[nn.Module, Any]], seed: int) -> None:
    torch.manual_seed(seed)
    model, data = make()
    about, work = subject(model.eval(), data), Workload(model, data)

    def forward() -> Any:
        with about.forward_context():
            return work.loss_and_outputs()

    plain = take_baseline(about, forward)
    with applied(about, [Change(candidate=AUTOCAST.name)], {AUTOCAST.name: AUTOCAST}.__getitem__):
        changed, bits = read(model, forward), bits_of(about)
    expected = expect(model, forward, bits)
    verdict = judge(
        distance(plain.reading, changed), gate(Numerics.PRECISION, torch.bfloat16), plain.rounding, expected
    )
    assert verdict, verdict.reason


def test_noise_is_twice_as_large_for_a_bit_less_and_leaves_no_trace() -> None:
    model = Tiny()
    work, before = Workload(model, batch()), dict(vars(model.layers[0].up))  # type: ignore[union-attr]
    plain = read(model, work.loss_and_outputs)
    found = [expect(model, work.loss_and_outputs, Bits(LAYERS, size, size)) for size in (2.0**-4, 2.0**-5, 2.0**-6)]
    medians = [each.moved.median_gradient for each in found if each is not None]
    assert [round(b - a) for a, b in itertools.pairwise(medians)] == [6, 6]
    assert distance(plain, read(model, work.loss_and_outputs)).worst[1] == float("inf")
    assert vars(model.layers[0].up).keys() == before.keys()  # type: ignore[union-attr]
    assert not any(each._forward_hooks for each in model.modules())


def converted(model: nn.Module, recipe: str = "tensorwise") -> Callable[[], None]:
    layers = convert_to_float8(model, LAYERS, Float8Config.model_validate({"recipe": recipe, "emulate": True}))
    return lambda: restore_linear(layers)


def three_percent(model: Any) -> Callable[[], None]:
    """Far below what FP8 does, far above what rounding does."""
    handle = model.layers[0].up.register_forward_hook(lambda module, args, output: output * 1.03)
    return handle.remove  # type: ignore[no-any-return]


class Checked(Made):
    """As layers in FP8 are, on which nothing is judged that only rounds."""

    def check(self, subject: Subject, run: Callable[[], Tensor]) -> Decision:
        return Accepted("check", "right")


@pytest.mark.parametrize("kind", [Made, Checked])
def test_beside_fewer_bits_what_only_rounds_keeps_its_own_limits(kind: type[Made]) -> None:
    model = Tiny()
    about, work = subject(model, batch()), Workload(model, batch())
    plain = take_baseline(about, work.loss_and_outputs)
    made = [
        kind("bits", converted, Numerics.PRECISION),
        Made("right", lambda model: lambda: None),
        Made("wrong", three_percent),
    ]
    laboratory = Laboratory(about, work, plain, {each.name: each for each in made}.__getitem__, float("inf"))
    bits, right, wrong = (Change(candidate=each.name) for each in made)
    # One comparison of the whole would not show it.
    assert compare(laboratory, [bits, wrong], Numerics.PRECISION, plain)
    verdict = compare_whole(laboratory, [bits, wrong], plain)
    assert not verdict
    assert "; beside them " in verdict.reason
    for changes in ([bits], [right], [bits, right]):
        verdict = compare_whole(laboratory, changes, plain)
        assert verdict, verdict.reason
    assert not compare_whole(laboratory, [wrong], plain)
    assert laboratory.steady([bits, right]) == ([right] if kind is Checked else [bits, right])
