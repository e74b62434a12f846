"""Layers of one input merge where that is proved and may gain; numbers, parameters and undo are exact."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kpt_lightning.candidates import compile_blocks
from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.merged_linear import CANDIDATE
from kpt_lightning.candidates.sibling_inputs import siblings_with_one_input
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Float8Config, KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.precision.convert import convert_to_float8
from kpt_lightning.validation.calls import record_calls

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 96, "num_key_value_heads": 2, "pad_token_id": 0, **SMALL}
IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
TOKENS = {"input_ids": IDS, "labels": IDS}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {"image_size": 32, "patch_size": 8, **SMALL, **NO_DROPOUT}
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}

MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor], list[str]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, TOKENS, ["q_proj k_proj v_proj", "gate_proj up_proj"]),
    "qwen3": (
        "Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 16}, TOKENS,
        ["q_proj k_proj v_proj", "gate_proj up_proj"],
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", TEXT, TOKENS, ["q_proj k_proj v_proj", "gate_proj up_proj"]),
    "gemma": (
        "GemmaForCausalLM", "GemmaConfig", {**TEXT, "head_dim": 16}, TOKENS,
        ["q_proj k_proj v_proj", "gate_proj up_proj"],
    ),
    "bert": ("BertForMaskedLM", "BertConfig", {"vocab_size": 96, **SMALL, **NO_DROPOUT}, TOKENS, ["query key value"]),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, PIXELS, ["q_proj k_proj v_proj"]),
}  # fmt: skip


def build(name: str) -> tuple[Any, dict[str, Tensor]]:
    model, config, settings, batch, _ = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)), batch


def subject(model: nn.Module, batch: Any = None, **known: Any) -> Subject:
    if batch is not None:
        known["calls"] = record_calls(model, lambda: model(**batch))
    device = next(model.parameters()).device
    return Subject(model=model, profile=detect(), config=KptConfig(), device=device, batch=batch, **known)


def results(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    loss = run()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


class Pair(nn.Module):
    """Two layers of one input, if it is one."""

    def __init__(self, bias: bool = True, copies: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.copies = nn.Linear(16, 8, bias=bias), nn.Linear(16, 24, bias=bias), copies

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).square().mean() + self.b(x.clone() if self.copies else x).sin().mean()


GROUP = {"groups": [["a", "b"]]}
X = {"x": torch.randn(4, 16)}


def reason(model: nn.Module, batch: Any = X) -> str:
    (only,) = CANDIDATE.proposals(subject(model, batch))
    assert isinstance(only, Rejected)
    return only.reason


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_found_by_their_input_and_a_merged_model_gives_the_same_gradients(name: str) -> None:
    model, batch = build(name)
    facts = [(key, id(each)) for key, each in model.named_parameters()]
    kinds = [type(each) for each in model.modules()]
    exact = results(model, lambda: model(**batch).loss)
    on = subject(model, batch)
    (change,) = CANDIDATE.proposals(on)
    assert isinstance(change, Change)
    found = {" ".join(each.rpartition(".")[2] for each in group) for group in change.setting["groups"]}
    assert found == set(MODELS[name][4])
    applied = CANDIDATE.apply(on, Change.from_dict(change.to_dict()).setting)
    assert [(key, id(each)) for key, each in model.named_parameters()] == facts
    for one, other in zip(results(model, lambda: model(**batch).loss), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    CANDIDATE.undo(on, applied)
    assert [type(each) for each in model.modules()] == kinds
    for one, other in zip(results(model, lambda: model(**batch).loss), exact, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_biases_and_autocast_give_the_same(bias: bool, autocast: bool) -> None:
    model = Pair(bias)
    on = subject(model)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(X["x"])

    exact = results(model, run)
    applied = CANDIDATE.apply(on, GROUP)
    for one, other in zip(results(model, run), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-6)
    CANDIDATE.undo(on, applied)


def test_a_layer_called_on_another_input_or_first_computes_by_itself() -> None:
    model = Pair()
    x, y = torch.randn(4, 16), torch.randn(4, 16)
    want = model.a(x), model.b(y)
    on = subject(model)
    applied = CANDIDATE.apply(on, GROUP)
    torch.testing.assert_close((model.a(x), model.b(y)), want)
    torch.testing.assert_close((model.b(y), model.a(x)), want[::-1])
    CANDIDATE.undo(on, applied)


def test_an_optimizer_step_moves_the_merged_layers_as_it_moves_them_apart() -> None:
    weights = []
    for merged in (True, False):
        torch.manual_seed(0)
        model = Pair()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if merged:
            CANDIDATE.apply(subject(model), GROUP)
        for _ in range(3):
            optimizer.zero_grad()
            model(X["x"]).backward()
            optimizer.step()
        weights.append(dict(model.state_dict()))
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_gradients(reentrant: bool) -> None:
    model = Pair()
    x = torch.randn(4, 16, requires_grad=True)
    exact = results(model, lambda: model(x))
    on = subject(model)
    applied = CANDIDATE.apply(on, GROUP)
    loss = checkpoint(model, x, use_reentrant=reentrant)
    loss.backward()
    for each, other in zip(model.parameters(), exact[1:], strict=True):
        torch.testing.assert_close(each.grad, other)
    CANDIDATE.undo(on, applied)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_merged_group_compiles_to_one_graph_with_one_product() -> None:
    model = Pair()
    exact = results(model, lambda: model(X["x"]))
    on = subject(model)
    applied = CANDIDATE.apply(on, GROUP)
    explained = torch._dynamo.explain(model)(X["x"])
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    assert sum("linear" in str(node.target) for node in explained.graphs[0].graph.nodes) == 1
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for one, other in zip(results(model, lambda: whole(X["x"])), exact, strict=True):
            torch.testing.assert_close(one, other)
    CANDIDATE.undo(on, applied)


def test_copies_and_pickles_of_a_merged_model_stand_alone() -> None:
    model = Pair()
    on = subject(model)
    applied = CANDIDATE.apply(on, GROUP)
    model.a(X["x"])  # b has not come for its part
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.b.weight.zero_()
            assert not torch.equal(twin(X["x"]), model(X["x"]))
            torch.testing.assert_close(twin.b(X["x"]), twin.b.bias.expand(4, -1))
    CANDIDATE.undo(on, applied)


def test_equal_values_in_another_tensor_are_no_common_input() -> None:
    assert reason(Pair(copies=True)) == "no two linear layers of one module read the same tensor"
    assert siblings_with_one_input(Pair(), lambda: None) == []


def test_fp8_frozen_hooked_shared_and_strange_layers_stay_with_the_reason() -> None:
    def change(act: Callable[[Pair], Any]) -> str:
        model = Pair()
        act(model)
        return reason(model)

    sized = {"emulate": True, "only_where_it_pays": False, "odd_dims": "pad"}
    config = Float8Config.model_validate(sized)
    assert "b runs in FP8" in change(lambda it: convert_to_float8(it, ["b"], config))
    assert "a is frozen" in change(lambda it: it.a.weight.requires_grad_(False))
    assert "b has hooks" in change(lambda it: it.b.register_forward_hook(lambda *_: None))
    assert "forward was replaced" in change(lambda it: vars(it.a).update(forward=it.a.forward))
    assert "not nn.Linear" in change(lambda it: torch.nn.utils.parametrizations.weight_norm(it.a))
    assert "biases in some" in change(lambda it: setattr(it.a, "bias", None))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_lora_layers_stay() -> None:
    model, batch = build("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert "is frozen" in reason(model, batch)


@pytest.mark.parametrize(("outputs", "rows", "expected"), [(40, 4, "times as wide"), (16, 2**27, "GFLOP")])
def test_wide_and_large_groups_are_rejected_with_what_was_measured(outputs: int, rows: int, expected: str) -> None:
    model = Pair()
    model.a, model.b = nn.Linear(16, outputs), nn.Linear(16, outputs)
    on = subject(model, X)
    call = on.calls["a"]
    large = type(call.args[0])(
        (rows, 16), *[getattr(call.args[0], each) for each in ("dtype", "device", "requires_grad")]
    )
    on.calls = {**on.calls, "a": type(call)((large,), {}, call.output, None, True)}
    (only,) = CANDIDATE.proposals(on)
    assert isinstance(only, Rejected)
    assert expected in only.reason


def test_on_a_cpu_nothing_is_proposed() -> None:
    (only,) = CANDIDATE.applies(subject(Pair(), X))
    assert isinstance(only, Rejected)
    assert "cpu" in only.reason


@pytest.mark.parametrize("model", ["gpt2", "encoder"])
def test_models_whose_layers_are_merged_by_themselves_have_no_group(model: str) -> None:
    if model == "gpt2":
        assert "no two linear layers" in reason(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), TOKENS)
        return
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    assert "no two linear layers" in reason(nn.TransformerEncoder(layer, 2), {"src": torch.randn(2, 8, 64)})


@pytest.mark.parametrize("group", [["a", "nowhere"], ["a"], ["a", "c"]])
def test_a_plan_of_another_model_is_refused_and_nothing_changes(group: list[str]) -> None:
    model = Pair()
    model.c = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="Make a new plan"):
        CANDIDATE.apply(subject(model), {"groups": [["a", "b"], group]})
    assert type(model.a) is nn.Linear


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # of the compiler
def test_on_cuda_compiled_blocks_with_merged_layers_give_the_same_gradients() -> None:
    model, _ = build("llama")
    model = model.cuda()
    batch = {name: each.cuda() for name, each in TOKENS.items()}

    def run() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(**batch).loss

    exact = results(model, run)
    on = subject(model, batch)
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change)
    applied = CANDIDATE.apply(on, change.setting)
    blocks = compile_blocks.CANDIDATE.apply(on, {"blocks": ["model.layers.0", "model.layers.1"]})
    for one, other in zip(results(model, run), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=2e-2)
    compile_blocks.CANDIDATE.undo(on, blocks)
    CANDIDATE.undo(on, applied)
