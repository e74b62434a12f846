import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.candidates.activation_checkpointing import CANDIDATE
from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.compile_blocks import compile_blocks
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.measure.saved import saved_bytes
from kpt_lightning.validation.calls import record_calls

# torch's advice while it compiles for a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(8, 64), nn.Linear(64, 8), nn.Dropout(dropout)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + scale * self.dropout(self.down(nn.functional.gelu(self.up(x))))


class Stack(nn.Module):
    def __init__(self, dropout: float = 0.0, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return x


def subject(model: nn.Module, run: Callable[[], Any], goal: Any = "memory", **known: Any) -> Subject:
    device = next(model.parameters()).device
    calls = record_calls(model, run)
    return Subject(model=model, profile=detect(), config=KptConfig(), device=device, goal=goal, calls=calls, **known)


def data(device: str = "cpu") -> Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(1)).to(device)


def results(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    torch.manual_seed(7)
    loss = run()
    trained = [each for each in model.parameters() if each.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)]


def reason(answer: Any) -> str:
    (only,) = answer
    assert isinstance(only, Rejected)
    return only.reason


def facts(model: nn.Module) -> list[Any]:
    return [(name, type(each), sorted(vars(each))) for name, each in model.named_modules()]


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_numbers_stay_to_the_bit_memory_falls_by_what_was_promised_and_undo_leaves_no_trace(dropout: float) -> None:
    model, x = Stack(dropout), data()
    on = subject(model, lambda: model(x))
    before, keys, state = facts(model), list(model.state_dict()), torch.get_rng_state()
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change)
    assert facts(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    exact, kept = results(model, lambda: model(x).square().mean()), saved_bytes(lambda: model(x))
    applied = CANDIDATE.apply(on, Change.from_dict(change.to_dict()).setting)
    for one, other in zip(exact, results(model, lambda: model(x).square().mean()), strict=True):
        assert torch.equal(one, other)
    assert list(model.state_dict()) == keys
    # Three blocks of four: gelu's input and output, and the mask of dropout.
    assert change.saves_bytes >= 3 * 2 * 32 * 64 * 4
    assert kept - saved_bytes(lambda: model(x)) >= change.saves_bytes
    CANDIDATE.undo(on, applied)
    assert facts(model) == before


def test_frozen_weights_below_and_no_gradients_at_all_are_fine() -> None:
    model, x = Stack(), data()
    model.layers[0].requires_grad_(False)
    on = subject(model, lambda: model(x))
    exact = results(model, lambda: model(x).square().mean())
    CANDIDATE.apply(on, CANDIDATE.applies(on)[0].setting)
    for one, other in zip(exact, results(model, lambda: model(x).square().mean()), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert not model(x).requires_grad


def test_copies_of_a_changed_model_share_nothing_with_it() -> None:
    model, x = Stack(), data()
    on = subject(model, lambda: model(x))
    applied = CANDIDATE.apply(on, CANDIDATE.applies(on)[0].setting)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(other.layers[1])["forward"].module is other.layers[1]
        with torch.no_grad():
            other.layers[1].up.weight.zero_()
        assert not torch.equal(other(x), model(x))
    CANDIDATE.undo(on, applied)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_inside_compiled_blocks_it_traces_whole_keeps_the_numbers_and_saves(device: str) -> None:
    model, x = Stack(depth=2).to(device), data(device)
    on = subject(model, lambda: model(x))
    setting = CANDIDATE.applies(on)[0].setting
    compile_blocks(model, setting["blocks"], "plain")
    exact, kept = results(model, lambda: model(x).square().mean()), saved_bytes(lambda: model(x))
    applied = CANDIDATE.apply(on, setting)
    compile_blocks(model, setting["blocks"], "checkpointed")
    torch._dynamo.utils.counters.clear()
    for one, other in zip(exact, results(model, lambda: model(x).square().mean()), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert kept - saved_bytes(lambda: model(x)) >= 32 * 64 * 4
    CANDIDATE.undo(on, applied)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_dropout_in_a_compiled_checkpointed_block_is_the_same_forward_and_backward(device: str) -> None:
    model = Stack(0.5).to(device)
    block = model.layers[0]
    with torch.no_grad():
        block.down.weight.zero_()
        block.down.bias.fill_(1.0)
    x = data(device).requires_grad_()
    on = subject(model, lambda: model(x))
    applied = CANDIDATE.apply(on, {"blocks": ["layers.0"]})
    compile_blocks(model, ["layers.0"], "dropout")
    out = block(x)
    out.sum().backward()
    # out - x is the mask of dropout, and the gradient of the bias is its sum over rows.
    torch.testing.assert_close(block.down.bias.grad, (out - x).detach().sum(0))
    assert 0 < int((out == x).sum()) < out.numel()
    CANDIDATE.undo(on, applied)


def tiny(kind: str) -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=16)
        return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}
    if kind == "vit":
        config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return transformers.ViTForImageClassification(config), {"pixel_values": pixels, "labels": ids[:, 0] % 3}
    name = {"llama": "Llama", "qwen3": "Qwen3", "mistral": "Mistral", "gemma": "Gemma", "bert": "Bert"}[kind]
    heads = {} if kind == "bert" else {"num_key_value_heads": 1, "head_dim": 8}
    config = getattr(transformers, f"{name}Config")(vocab_size=32, **sizes, **heads)
    head = "MaskedLM" if kind == "bert" else "CausalLM"
    return getattr(transformers, f"{name}For{head}")(config), {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma", "gpt2", "bert", "vit"])
def test_transformers_models_train_as_before_and_keep_less(kind: str) -> None:
    model, batch = tiny(kind)
    model.train()
    on = subject(model, lambda: model(**batch))
    cache = getattr(model.config, "use_cache", None)
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change), change
    exact, kept = results(model, lambda: model(**batch).loss), saved_bytes(lambda: model(**batch).loss)
    applied = CANDIDATE.apply(on, change.setting)
    for one, other in zip(exact, results(model, lambda: model(**batch).loss), strict=True):
        torch.testing.assert_close(one, other)  # another path without the cache, hence not to the bit
    assert kept - saved_bytes(lambda: model(**batch).loss) >= change.saves_bytes > 0
    CANDIDATE.undo(on, applied)
    assert getattr(model.config, "use_cache", None) == cache


def test_an_encoder_of_torch_trains_as_before_under_autocast() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).square().mean()

    on = subject(model, run)
    (change,) = CANDIDATE.applies(on)
    assert isinstance(change, Change), change
    exact, kept = results(model, run), saved_bytes(run)
    CANDIDATE.apply(on, change.setting)
    for one, other in zip(exact, results(model, run), strict=True):
        assert torch.equal(one, other)
    assert kept - saved_bytes(run) >= change.saves_bytes


class Counter(Block):
    """Keeps a running mean, as batch norm does."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.norm(super().forward(x, scale=scale))


class Memory:
    """An object of the user's that a block may write to."""


class WithMemory(Block):
    def forward(self, x: Tensor, *, scale: Any = 1.0) -> Tensor:
        return super().forward(x)


def stack_of(make: Callable[[], nn.Module]) -> nn.Module:
    model = Stack()
    model.layers = nn.ModuleList(make() for _ in range(2))
    return model


def with_own_forward() -> nn.Module:
    model = Stack()
    for layer in model.layers:
        layer.forward = layer.forward
    return model


def run_with_memory(model: Any) -> Tensor:
    return model.layers[1](model.layers[0](data(), scale=Memory()), scale=Memory())


@pytest.mark.parametrize(
    ("make", "run", "why"),
    [
        (lambda: stack_of(Counter), lambda model: model(data()), "changes 'norm.num_batches_tracked'"),
        (with_own_forward, lambda model: model(data()), "replaced on the object"),
        (lambda: stack_of(lambda: WithMemory(0.0)), run_with_memory, "called with a Memory"),
        (Stack, lambda model: None, "not called in the recorded pass"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), lambda model: model(data()), "no repeated blocks"),
    ],
    ids=["batch norm", "own forward", "own object", "not called", "no blocks"],
)
def test_blocks_that_cannot_run_twice_are_declined_with_the_reason(make: Any, run: Any, why: str) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    assert why in reason(CANDIDATE.applies(subject(model, lambda: None if run is None else run(model))))
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items()) or "norm" in why


def test_checkpointing_of_transformers_itself_is_left_alone() -> None:
    model, batch = tiny("llama")
    model.activation_checkpointing_enable()
    assert "on already" in reason(CANDIDATE.applies(subject(model, lambda: model(**batch))))


def test_where_memory_is_not_short_nothing_is_proposed() -> None:
    model = Stack()
    assert "memory is not short" in reason(CANDIDATE.applies(subject(model, lambda: model(data()), goal="speed")))


def test_a_stored_setting_for_another_model_is_refused_and_nothing_changes() -> None:
    model = Stack()
    before = facts(model)
    with pytest.raises(ConfigError, match="is no module of this model"):
        CANDIDATE.apply(subject(model, lambda: None), {"blocks": ["layers.0", "layers.9"]})
    assert facts(model) == before


@pytest.mark.cuda
def test_on_cuda_the_peak_falls_by_what_was_promised() -> None:
    torch.manual_seed(0)
    model = Stack().cuda()
    x = torch.randn(2**16, 8, device="cuda")
    on = subject(model, lambda: model(x))
    (change,) = CANDIDATE.applies(on)

    def peak() -> int:
        torch.cuda.reset_peak_memory_stats()
        model(x).square().mean().backward()
        model.zero_grad()
        return torch.cuda.max_memory_allocated()

    peak()
    before = peak()
    CANDIDATE.apply(on, change.setting)
    assert before - peak() >= 0.9 * change.saves_bytes
