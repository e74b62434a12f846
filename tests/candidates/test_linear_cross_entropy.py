"""Head and loss of transformers models as one: the same loss and gradients, logits for whoever looks, and no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from kpt_lightning.candidates import linear_cross_entropy
from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.compile_loss import decide_loss
from kpt_lightning.candidates.deferred_logits import DeferredLogits
from kpt_lightning.candidates.linear_cross_entropy import CANDIDATE, FusedLoss, decide_head
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Float8Config, KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.precision.convert import convert_to_float8
from kpt_lightning.validation.calls import record_calls
from tests.candidates.fused_loss import (
    BF16,
    LENGTH,
    MODELS,
    SETTINGS,
    SIZES,
    VOCABULARY,
    assert_alike,
    batch,
    build,
    changed,
    results,
)


def subject(model: nn.Module, run: Callable[[], Any] | None = None, **settings: Any) -> Subject:
    calls = record_calls(model, run or (lambda: model(**batch())))
    arguments: dict[str, Any] = dict(goal="memory") | settings
    device = torch.device("cpu")
    return Subject(model=model, profile=detect(), config=KptConfig(), device=device, calls=calls, **arguments)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_the_models_own(name: str) -> None:
    model = build(name)
    before = results(model)
    with changed(model):
        assert_alike(before, results(model))
    assert torch.equal(results(model)["loss"], before["loss"])


@pytest.mark.parametrize("more", [dict(num_items_in_batch=9), dict(num_items_in_batch=torch.tensor(9))], ids=str)
def test_a_count_of_items_divides_the_loss_as_before(more: dict[str, Any]) -> None:
    model = build()
    before = results(model, **more)
    assert before["loss"] > 1.5 * results(model)["loss"]
    with changed(model):
        assert_alike(before, results(model, **more))


def test_shifted_labels_that_the_user_gives_are_taken_as_they_are() -> None:
    model = build()
    shifted = batch()["labels"].roll(3, dims=1)
    before = results(model, shift_labels=shifted)
    with changed(model):
        assert_alike(before, results(model, shift_labels=shifted))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_under_autocast_it_is_as_near_as_rounding_lets_it_be(name: str) -> None:
    model = build(name)
    before = results(model, BF16)
    with changed(model):
        assert_alike(before, results(model, BF16), allowed=0.02)


def test_gradients_of_several_passes_add_up() -> None:
    def accumulated(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        for _ in range(2):
            (model(**batch()).loss / 2).backward()
        return {name: each.grad.clone() for name, each in model.named_parameters()}

    model = build("llama tied")
    before = accumulated(model)
    with changed(model):
        assert_alike(before, accumulated(model))


@pytest.mark.parametrize("name", MODELS)
def test_it_is_accepted_where_it_is_proved(name: str) -> None:
    model = build(name)
    sub = subject(model)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    verdict = decide_head(model, sub.calls)
    assert verdict, verdict.reason
    assert verdict.subject == "lm_head"
    assert "_loss_function" not in vars(model)
    assert type(model.lm_head) is nn.Linear
    assert all(each.grad is None for each in model.parameters())
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())


def test_it_is_accepted_inside_another_module_and_under_autocast() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

    model = Module()

    def run() -> None:
        with torch.autocast("cpu", BF16):
            model.net(**batch())

    verdict = decide_head(model, subject(model, run).calls)
    assert verdict, verdict.reason
    assert verdict.subject == "net.lm_head"
    with changed(model, SETTINGS | {"head": "net.lm_head"}):
        assert isinstance(model.net(**batch()).logits, DeferredLogits)


def reason(model: nn.Module, run: Callable[[], Any] | None = None) -> str:
    verdict = decide_head(model, subject(model, run).calls)
    assert isinstance(verdict, Rejected)
    return verdict.reason


def test_logits_that_are_capped_between_head_and_loss_are_refused() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=5.0)).eval()
    assert "between head and loss" in reason(model)
    before = results(model)
    # A plan that somebody forced does no harm.
    with changed(model):
        assert_alike(before, results(model))


def test_a_model_that_reads_its_own_logits_is_refused() -> None:
    class Reading(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.loss = out.loss + 0.1 * out.logits.square().mean()
            return out

    torch.manual_seed(0)
    assert "computes with the logits" in reason(Reading(LlamaConfig(**SIZES)).eval())


def test_another_loss_function_of_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.loss import loss_utils

    def smoothed(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return loss_utils.ForCausalLMLoss(logits, labels, vocab_size, **kwargs) + 0.01 * logits.square().mean()

    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", smoothed)
    assert "own loss is another" in reason(build())


def with_hook(model: nn.Module) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def in_fp8(model: nn.Module) -> None:
    model.lm_head = nn.Linear(32, VOCABULARY + 13, bias=False)
    convert_to_float8(model, ["lm_head"], Float8Config(emulate=True))


def another_class(model: nn.Module) -> None:
    class Adapted(nn.Linear):
        pass

    model.lm_head = Adapted(32, VOCABULARY, bias=False)


def with_loss(model: nn.Module) -> None:
    model.loss_function = lambda *_, **__: torch.zeros(())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (with_hook, "a hook is on the head"),
        (in_fp8, "the head is Float8Linear"),
        (another_class, "the head is Adapted"),
        (with_loss, "was replaced already"),
    ],
)
def test_a_head_or_loss_that_is_not_plain_is_refused(change: Callable[[nn.Module], None], text: str) -> None:
    model = build()
    sub = subject(model)
    change(model)
    (found,) = CANDIDATE.applies(sub)
    assert isinstance(found, Rejected)
    assert text in found.reason
    with pytest.raises(ConfigError, match=text):
        CANDIDATE.apply(sub, SETTINGS)


def test_what_gives_no_loss_of_its_own_is_refused() -> None:
    model = build()
    assert "given no labels" in reason(model, lambda: model(batch()["input_ids"]))
    assert "loss_function" in reason(nn.Linear(3, 3), lambda: None)
    assert "no call" in decide_head(model, {}).reason


def test_speed_on_a_cpu_is_not_promised_and_memory_only_where_there_is_some_to_save(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build()
    (found,) = CANDIDATE.applies(subject(model, goal="speed"))
    assert isinstance(found, Rejected)
    assert "goal='memory'" in found.reason
    (found,) = CANDIDATE.applies(subject(model))
    assert isinstance(found, Rejected)
    assert "too few for chunks of 1024 rows" in found.reason
    monkeypatch.setattr(linear_cross_entropy, "_FEWEST_ROWS", 8)
    (found,) = CANDIDATE.applies(subject(model))
    assert isinstance(found, Change)
    # Two fp32 tensors of the size of the logits, against 8 rows of logits and of their gradient.
    assert found.saves_bytes == 8 * 2 * LENGTH * VOCABULARY - 2 * 8 * VOCABULARY * 4
    before = results(model)
    with changed(model, Change.from_dict(found.to_dict()).setting):
        assert model.loss_function.chunk_rows == 8
        assert_alike(before, results(model))


def test_the_loss_cannot_be_compiled_as_well() -> None:
    model = build()
    with changed(model):
        assert "replaced already" in decide_loss(model).reason
    assert decide_loss(model)


def test_a_fused_loss_gives_everything_else_to_the_original() -> None:
    given: list[Any] = []

    def original(*args: Any, **kwargs: Any) -> Tensor:
        given.append((args, kwargs))
        return torch.zeros(())

    logits, labels = torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.int64)
    FusedLoss(original)(logits, labels, vocab_size=5, other=1)
    ((args, kwargs),) = given
    assert args == (logits, labels, 5)
    assert kwargs == dict(num_items_in_batch=None, ignore_index=-100, shift_labels=None, other=1)


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)
