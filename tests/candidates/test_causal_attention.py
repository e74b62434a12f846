"""The dense-mask trap is found by what ran, taken away, and put back."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kpt_lightning.attention.observe import observe_attention
from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.causal_attention import CANDIDATE
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.candidates.whole_compile import compiled_wholes
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.validation.calls import record_calls

IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
# The trap lies in tracing; this backend traces as inductor does, and is quick.
QUICK = "aot_eager"


class Task(nn.Module):
    """A model inside another module, as in a LightningModule."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def compiled_in_place() -> nn.Module:
    model = llama()
    model.compile(backend=QUICK)
    return model


def compiled_inside() -> nn.Module:
    return Task(torch.compile(llama(), backend=QUICK))


def compiled_part() -> nn.Module:
    model = llama()
    model.model.compile(backend=QUICK)
    return model


TRAPPED = {"model.compile()": compiled_in_place, "torch.compile inside": compiled_inside, "a part": compiled_part}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def subject(model: nn.Module, batch: Any = BATCH, record: bool = True) -> Subject:
    known = {"calls": record_calls(model, lambda: model(**batch))} if record else {}
    device = next(model.parameters()).device
    return Subject(model=model, profile=detect(), config=KptConfig(), device=device, batch=batch, key="test", **known)


def reason(on: Subject) -> str:
    (only,) = CANDIDATE.applies(on)
    assert isinstance(only, Rejected)
    return only.reason


def masks(model: nn.Module, batch: Any = BATCH) -> list[bool]:
    return [call.mask is not None for call in observe_attention(lambda: model(**batch))]


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@pytest.mark.parametrize("name", TRAPPED)
def test_the_trap_is_found_and_undo_leaves_the_users_compilation_as_it_was(name: str) -> None:
    model = TRAPPED[name]()
    assert masks(model) == [True, True]
    before = {each: (type(module), dict(vars(module))) for each, module in model.named_modules()}
    on = subject(model, record=False)
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change)
    assert "dense mask: computed 2.0x the useful FLOPs" in change.reason
    assert len(change.setting["blocks"]) == 2
    applied = CANDIDATE.apply(on, Change.from_dict(change.to_dict()).setting)
    with torch.compiler.set_stance("force_eager"):
        assert masks(model) == [False, False]
    assert all(not module._compiled_call_impl for module in model.modules() if not hasattr(module, "self_attn"))
    CANDIDATE.undo(on, applied)
    for each, module in model.named_modules():
        assert (type(module), dict(vars(module))) == before[each]
    assert masks(model) == [True, True]


def test_blocks_compiled_instead_attend_causally_and_give_the_same_numbers() -> None:
    model = compiled_inside()
    keys = list(model.state_dict())
    with torch.compiler.set_stance("force_eager"):
        loss = model(**BATCH).loss
        exact = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    on = subject(model, record=False)
    applied = CANDIDATE.apply(
        on, {"wholes": ["model"], "blocks": [f"model._orig_mod.model.layers.{n}" for n in (0, 1)]}
    )
    copied = copy.deepcopy(model)
    loss = model(**BATCH).loss
    results = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    for one, other in zip(results, exact, strict=True):
        torch.testing.assert_close(one, other)
    assert [(call.causal, call.mask) for call in observe_attention(lambda: model(**BATCH))] == [(True, None)] * 2
    assert list(model.state_dict()) == keys
    assert copied.model._orig_mod is not model.model._orig_mod
    CANDIDATE.undo(on, applied)


def test_a_model_that_nobody_compiled_has_no_trap() -> None:
    assert reason(subject(llama())).startswith("no mask tensor is passed: 2 calls: flash, causal")


def test_padding_is_the_models_own_mask_compiled_or_not() -> None:
    padded = {**BATCH, "attention_mask": torch.ones_like(IDS).index_fill(1, torch.tensor([20, 21, 22, 23]), 0)}
    text = "the mask is needed"
    assert reason(subject(llama(), padded)).startswith(text)
    assert reason(subject(compiled_in_place(), padded, record=False)).startswith(text)


def test_packed_rows_are_named_with_what_would_be_needed() -> None:
    positions = torch.arange(12).repeat(2).expand(2, 24)
    model = llama()
    model.config.use_cache = False  # with a cache transformers does not look for packed rows
    text = reason(subject(model, {"input_ids": IDS, "position_ids": positions}))
    assert "4 sequences are packed into 2 rows" in text
    assert "flex_attention" in text


class Triangular(nn.Module):
    """Passes a mask that says no more than causal."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        rows = self.line(x)
        return nn.functional.scaled_dot_product_attention(rows, rows, rows, attn_mask=self.mask).square().mean()


def test_a_mask_that_happens_to_be_causal_is_named_and_left() -> None:
    text = reason(subject(Triangular(), {"x": torch.randn(2, 4, 16, 8)}))
    assert "the mask of this batch is just causal" in text
    assert "pass is_causal=True" in text


def test_an_encoder_of_torch_with_a_causal_mask_needs_nothing() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    batch = {"src": torch.randn(2, 16, 64), "mask": nn.Transformer.generate_square_subsequent_mask(16)}
    assert reason(subject(nn.TransformerEncoder(layer, 2), batch)).startswith("no mask tensor is passed")


def test_a_model_without_attention_is_rejected_with_what_was_not_seen() -> None:
    assert "no call seen" in reason(subject(nn.Linear(4, 4), {"input": torch.randn(2, 4)}))


def test_without_a_batch_nothing_can_be_seen() -> None:
    model = llama()
    on = Subject(model=model, profile=detect(), config=KptConfig(), device=torch.device("cpu"))
    assert "no batch" in reason(on)


def test_a_plan_of_another_model_is_refused_and_nothing_stays_changed() -> None:
    model = compiled_in_place()
    before = dict(vars(model))
    on = subject(model, record=False)
    for setting in ({"wholes": ["nowhere"], "blocks": []}, {"wholes": [""], "blocks": ["model.layers.7"]}):
        with pytest.raises(ConfigError, match="Make a new plan"):
            CANDIDATE.apply(on, setting)
    assert dict(vars(model)) == before


@pytest.mark.parametrize("make", [llama, compiled_in_place, compiled_inside, compiled_part])
def test_wholes_are_the_outermost_compiled_modules_with_their_blocks(make: Callable[[], nn.Module]) -> None:
    expected: dict[Any, dict[str, list[str]]] = {
        llama: {},
        compiled_in_place: {"": ["model.layers.0", "model.layers.1"]},
        compiled_inside: {"model": ["model._orig_mod.model.layers.0", "model._orig_mod.model.layers.1"]},
        compiled_part: {"model": ["model.layers.0", "model.layers.1"]},
    }
    assert compiled_wholes(make()) == expected[make]


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # of the compiler
def test_on_cuda_the_trap_is_found_and_blocks_attend_causally_in_one_fused_kernel() -> None:
    model = llama().cuda().bfloat16()
    model.compile()
    batch = {name: each.cuda() for name, each in BATCH.items()}
    on = subject(model, batch, record=False)
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change)
    applied = CANDIDATE.apply(on, change.setting)
    model(**batch).loss.backward()
    calls = observe_attention(lambda: model(**batch).loss.backward())
    assert [(call.causal, call.mask) for call in calls] == [(True, None)] * 2
    assert all(call.backend in ("cudnn", "flash", "efficient") for call in calls)
    CANDIDATE.undo(on, applied)
