"""Head and loss of transformers models as one: the same loss and gradients, logits for whoever looks, and no trace."""

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kpt_lightning.candidates import linear_cross_entropy
from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.compile_loss import decide_loss
from kpt_lightning.candidates.deferred_logits import DeferredLogits, defer
from kpt_lightning.candidates.linear_cross_entropy import CANDIDATE, FusedLoss, decide_head
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Float8Config, KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.precision.convert import convert_to_float8
from kpt_lightning.validation.calls import record_calls
from kpt_lightning.validation.numerics import relative_error

BF16 = torch.bfloat16
VOCABULARY, LENGTH = 67, 12
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1)
    ),
}
SETTINGS = {"head": "lm_head", "chunk_rows": 7}


def build(name: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    # Dropout of GPT-2 would draw other numbers in each run.
    return MODELS[name]().eval()


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :3], labels[1, -4:] = -100, -100
    return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


def subject(model: nn.Module, run: Callable[[], Any] | None = None, **settings: Any) -> Subject:
    calls = record_calls(model, run or (lambda: model(**batch())))
    arguments: dict[str, Any] = dict(goal="memory") | settings
    device = torch.device("cpu")
    return Subject(model=model, profile=detect(), config=KptConfig(), device=device, calls=calls, **arguments)


@contextmanager
def changed(model: nn.Module, setting: Mapping[str, Any] = SETTINGS) -> Iterator[None]:
    sub = Subject(model=model, profile=detect(), config=KptConfig(), device=torch.device("cpu"))
    applied = CANDIDATE.apply(sub, setting)
    try:
        yield
    finally:
        CANDIDATE.undo(sub, applied)


def results(model: nn.Module, autocast: torch.dtype | None = None, **more: Any) -> dict[str, Tensor]:
    """Loss and every gradient."""
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = model(**batch(), **more).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor], allowed: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    # Some gradients are zero but for rounding, such as that of GPT-2's key bias.
    errors = {name: relative_error(each, other[name]) for name, each in one.items() if each.norm() > 1e-7}
    assert max(errors.values()) < allowed, errors


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


def test_the_logits_are_not_computed_unless_somebody_looks() -> None:
    model = build()
    with changed(model):
        logits = model(**batch()).logits
        assert isinstance(logits, DeferredLogits)
        assert (logits.shape, logits.dtype, logits.requires_grad) == ((2, LENGTH, VOCABULARY), torch.float32, True)
        assert not logits.computed
        logits.argmax(-1)
        assert logits.computed


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: x.softmax(-1),
    "index": lambda x: x[:, -1, 3:9],
    "detach": lambda x: x.detach(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "data": lambda x: x.data,
    "float": lambda x: x.float() * 1,
    "cat": lambda x: torch.cat([x, x]),
    "where": lambda x: torch.where(x > 0, x, 0),
    "out": lambda x: torch.add(1, x),
    "repr": lambda x: torch.tensor([ord(each) for each in repr(x.detach())]),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "data_ptr": lambda x: torch.tensor(x.data_ptr() != 0),
    "view": lambda x: x.view(-1, VOCABULARY).sum(0),
    "copy": lambda x: torch.empty(x.shape).copy_(x),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whatever_looks_at_the_logits_finds_them(look: str) -> None:
    model = build()
    wanted = LOOKS[look](model(**batch()).logits)
    with changed(model):
        found = LOOKS[look](model(**batch()).logits)
    assert not isinstance(found, DeferredLogits)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def square(logits: Tensor) -> Tensor:
    return logits.square().mean()


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


def masked(logits: Tensor) -> Tensor:
    logits[..., 5] = 0.0
    return (logits[..., 4:7] * 3).square().sum()


def scaled_in_place(logits: Tensor) -> Tensor:
    return logits.div_(3.0).square().sum()


@pytest.mark.parametrize(
    "loss", [square, _Custom.apply, masked, scaled_in_place], ids=["square", "custom", "masked", "in place"]
)
def test_gradients_flow_through_the_logits_too(loss: Callable[[Tensor], Tensor]) -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        out = model(**batch())
        total = out.loss + loss(out.logits)
        names, parameters = zip(*model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(total, parameters), strict=True))

    model = build("gpt2")
    before = gradients(model)
    with changed(model):
        assert_alike(before, gradients(model), allowed=2e-5)


def test_logits_that_are_read_after_the_weight_changed_are_an_error_not_others() -> None:
    model = build()
    with changed(model):
        seen, late = model(**batch()).logits, model(**batch()).logits
        wanted = seen.detach().clone()
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)
        assert torch.equal(seen.detach(), wanted)
        with pytest.raises(RuntimeError, match=r"read them before optimizer.step\(\)"):
            late.argmax(-1)


def test_a_gradient_of_the_logits_that_cannot_come_is_asked_for_in_vain_loudly() -> None:
    model = build()
    with changed(model):
        logits = model(**batch()).logits
        with pytest.raises(RuntimeError, match="without these logits"):
            logits.retain_grad()


def test_logits_are_computed_in_the_dtype_of_their_own_autocast() -> None:
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", BF16):
        inside = defer(hidden, weight, None)
    outside = defer(hidden, weight, None)
    with torch.autocast("cpu", BF16):
        outside.argmax()
    assert (inside.detach().dtype, outside.detach().dtype) == (BF16, torch.float32)
    torch.testing.assert_close(outside.detach(), nn.functional.linear(hidden, weight).detach())


def test_a_cast_of_all_outputs_computes_nothing() -> None:
    model = build()

    def cast(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", BF16):
            return model(**batch()).logits.float()

    wanted = cast(model)
    (truth,) = torch.autograd.grad(wanted.square().sum(), model.lm_head.weight)
    with changed(model):
        found = cast(model)
        assert isinstance(found, DeferredLogits)
        assert not found.computed
        assert found.dtype == torch.float32
        (grad,) = torch.autograd.grad(found.square().sum(), model.lm_head.weight)
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-2, atol=1e-2)
    assert relative_error(truth, grad) < 0.02


def test_without_labels_or_gradient_nothing_changes_for_the_user() -> None:
    model = build()
    tokens = batch()["input_ids"]
    wanted = model(tokens).logits
    texts = model.generate(tokens, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        evaluated = model(**batch())
    with changed(model):
        assert torch.equal(model(tokens).logits + 0, wanted)
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), texts)
        with torch.no_grad():
            found = model(**batch())
        assert type(found.logits) is Tensor
        assert torch.equal(found.loss, evaluated.loss)
        with torch.inference_mode():
            assert torch.equal(model(**batch()).loss, evaluated.loss)


def test_undo_leaves_no_trace() -> None:
    model = build("llama tied")
    before = (type(model.lm_head), set(vars(model)), set(vars(model.lm_head)), list(model.state_dict()))
    parameters = [id(each) for each in model.parameters()]
    with changed(model):
        assert list(model.state_dict()) == before[3]
        assert [id(each) for each in model.parameters()] == parameters
        assert isinstance(model.lm_head, nn.Linear)
    assert (type(model.lm_head), set(vars(model)), set(vars(model.lm_head)), list(model.state_dict())) == before


def test_a_changed_model_can_be_copied_and_pickled() -> None:
    model = build()
    before = results(model)
    with changed(model):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(twin(**batch()).logits, DeferredLogits)
            assert_alike(before, results(twin))


def test_inside_compiled_code_the_head_gives_plain_logits() -> None:
    model = build()
    before = results(model)
    with changed(model):
        compiled = torch.compile(model, backend="eager")
        out = compiled(**batch())
        assert type(out.logits) is Tensor
        torch.testing.assert_close(out.loss.detach(), before["loss"])


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
