"""The kernel that is chosen is the one that runs, and the choice ends with undo."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kpt_lightning.attention import flash_package
from kpt_lightning.attention.backend import SDP, preferring
from kpt_lightning.attention.observe import observe_attention
from kpt_lightning.attention.proof import check_backend
from kpt_lightning.candidates import compile_blocks
from kpt_lightning.candidates.attention_backend import CANDIDATE
from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.inductor import Inductor
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.validation.calls import record_calls
from kpt_lightning.validation.numerics import sqnr_db


class Attention(nn.Module):
    """Causal self-attention with a linear layer before."""

    def __init__(self, heads: int = 4, size: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.line = nn.Linear(heads * size, heads * size)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.line(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = scaled_dot_product_attention(rows, rows, rows, dropout_p=self.dropout, is_causal=True)
        return out.float().square().mean()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def subject(model: nn.Module, *inputs: Tensor, **known: Any) -> Subject:
    device = next(model.parameters()).device
    calls = record_calls(model, lambda: model(*inputs)) if inputs else {}
    known = {"calls": calls, "batch": inputs or None, **known}
    return Subject(model=model, profile=detect(), config=KptConfig(), device=device, **known)


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 96, "pad_token_id": 0, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes}))


IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def backends(on: Subject, model: nn.Module, *inputs: Any) -> set[str]:
    def run() -> None:
        with on.forward_context():
            model(*inputs)

    return {call.backend for call in observe_attention(run)}


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_what_is_applied_runs_until_undo_with_the_same_numbers(backend: str) -> None:
    model, other = llama(), {"math": "flash", "flash": "math"}[backend]
    on = subject(model)

    def results() -> list[Tensor]:
        with on.forward_context():
            loss = model(input_ids=IDS, labels=IDS).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    with sdpa_kernel([SDP[other]]):
        exact = results()
        assert backends(on, model, IDS) == {other}
        applied = CANDIDATE.apply(on, {"backend": backend})
        calls = observe_attention(results)
        assert check_backend(calls, backend)
        assert not check_backend(calls, other)
        for one, two in zip(results(), exact, strict=True):
            torch.testing.assert_close(one, two)
        CANDIDATE.undo(on, applied)
        assert on.contexts == []
        assert backends(on, model, IDS) == {other}


def test_undo_takes_its_own_context_among_others() -> None:
    on = subject(llama())
    first = CANDIDATE.apply(on, {"backend": "math"})
    second = CANDIDATE.apply(on, {"backend": "flash"})
    kept = on.contexts[1]
    CANDIDATE.undo(on, first)
    assert on.contexts == [kept]
    CANDIDATE.undo(on, second)
    assert on.contexts == []


def test_what_is_proposed_is_never_what_runs_and_carries_its_times() -> None:
    model = Attention()
    x = torch.randn(2, 64, 64)
    with sdpa_kernel([SDPBackend.MATH]):
        (only,) = CANDIDATE.applies(subject(model, x, step_seconds=1e3))
    assert "flash" in only.reason
    assert " ms for each of 1: math" in only.reason
    if isinstance(only, Change):
        assert only.setting == {"backend": "flash"}
        assert only.predicted is not None
        assert 1 < only.predicted < 1.01


def test_a_backend_that_cannot_take_the_call_is_rejected_in_torchs_words() -> None:
    (only,) = CANDIDATE.applies(subject(Attention(dropout=0.1), torch.randn(2, 16, 64)))
    assert isinstance(only, Rejected)
    assert "dropout" in only.reason.partition("dropout 0.1: ")[2]


def test_scores_that_would_fill_the_memory_are_not_tried() -> None:
    (only,) = CANDIDATE.applies(subject(Attention(heads=64, size=1), torch.randn(1, 4096, 64)))
    assert isinstance(only, Rejected)
    assert "scores would take 4.0 GiB" in only.reason


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: llama(attn_implementation="eager"), "the model's attention is 'eager'"),
        (lambda: nn.Sequential(nn.Embedding(96, 4)), "no call of scaled_dot_product_attention was seen"),
    ],
)
def test_without_a_call_the_reason_names_what_attention_is(make: Callable[[], nn.Module], expected: str) -> None:
    (only,) = CANDIDATE.applies(subject(make(), IDS))
    assert isinstance(only, Rejected)
    assert expected in only.reason


def test_without_a_batch_nothing_is_proposed() -> None:
    (only,) = CANDIDATE.applies(subject(llama()))
    assert isinstance(only, Rejected)
    assert "no batch" in only.reason


@pytest.mark.parametrize("backend", ["cuda", "fa3", "fa4"])
def test_a_stored_plan_with_a_backend_that_is_not_here_is_refused(backend: str) -> None:
    if backend in flash_package.IMPLEMENTATIONS and flash_package.available(backend):
        pytest.skip(f"{backend} is installed")
    on = subject(llama())
    with pytest.raises(ConfigError, match=r"[Mm]ake a new plan"):
        CANDIDATE.apply(on, {"backend": backend})
    assert on.contexts == []


@pytest.mark.usefixtures("fresh_compiler")
def test_a_choice_that_was_compiled_before_is_not_taken_from_the_compilers_cache_for_another() -> None:
    q = torch.randn(2, 4, 16, 8, requires_grad=True)
    k = torch.randn(2, 2, 16, 8, requires_grad=True)

    def attend(query: Tensor, key: Tensor) -> Tensor:
        return scaled_dot_product_attention(2 * query, key, key, is_causal=True, enable_gqa=True)

    seen = []
    for backend in ("flash", "math", "flash"):
        torch._dynamo.reset()
        compiled = torch.compile(attend, backend=Inductor(backend))
        with preferring(backend):
            compiled(q, k).sum().backward()  # the cache takes up what was compiled with its backward pass
            seen.append([call.backend for call in observe_attention(lambda run=compiled: run(q, k))])
    # Math is traced into products and shows no call.
    assert seen == [["flash"], [], ["flash"]]


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_each_backend_of_cuda_runs_when_it_is_chosen(backend: str) -> None:
    model = Attention(heads=8, size=64).cuda().bfloat16()
    x = torch.randn(2, 256, 512, device="cuda", dtype=torch.bfloat16)
    on = subject(model, x)
    applied = CANDIDATE.apply(on, {"backend": backend})
    assert backends(on, model, x) == {backend}
    CANDIDATE.undo(on, applied)


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of the compilers
def test_blocks_compiled_under_their_own_key_keep_to_the_chosen_backend_on_cuda() -> None:
    # Memory-efficient attention takes no grouped heads.
    model = llama(hidden_size=256, num_key_value_heads=4).cuda().bfloat16()
    ids = IDS.cuda()
    installed = ["fa4"] if flash_package.available("fa4") else []
    for backend in ("efficient", "flash", "cudnn", *installed):
        on = subject(model, key=backend)
        applied = CANDIDATE.apply(on, {"backend": backend})
        blocks = compile_blocks.CANDIDATE.apply(on, {"blocks": ["model.layers.0", "model.layers.1"]})
        with on.forward_context():
            model(ids).logits.float().square().mean().backward()
        assert backends(on, model, ids) == {backend}
        compile_blocks.CANDIDATE.undo(on, blocks)
        CANDIDATE.undo(on, applied)


@pytest.mark.cuda
def test_on_cuda_every_other_backend_is_answered_for_with_times_or_a_reason() -> None:
    model = Attention(heads=8, size=64).cuda().bfloat16()
    x = torch.randn(2, 256, 512, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        answers = CANDIDATE.applies(subject(model, x))
    assert len(answers) == 4
    timed = [each for each in answers if " ms for each of 1: memory-efficient" in each.reason]
    assert len(timed) >= 2
    assert all(each.setting["backend"] != "efficient" for each in answers if isinstance(each, Change))


@pytest.mark.cuda
def test_a_call_that_the_chosen_kernel_cannot_take_falls_through_to_another() -> None:
    q = torch.randn(1, 2, 32, 16, device="cuda")  # float32, which neither cuDNN nor flash takes
    with preferring("flash"):
        (call,) = observe_attention(lambda: scaled_dot_product_attention(q, q, q))
    assert call.backend in ("efficient", "math")
    assert not check_backend([call], "flash")


@pytest.mark.sm90
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of the kernel's compiler
@pytest.mark.parametrize("key_heads", [8, 2])
def test_flash_attention_4_replaces_torchs_kernel_and_leaves_again(key_heads: int) -> None:
    if not (verdict := flash_package.available("fa4")):
        pytest.skip(verdict.reason)
    q = torch.randn(2, 8, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(2, key_heads, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv")

    def results() -> list[Tensor]:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=key_heads != 8)
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]

    with preferring("flash"):
        exact = results()
    on = subject(Attention().cuda())
    applied = CANDIDATE.apply(on, {"backend": "fa4"})
    with on.forward_context():
        (call,) = observe_attention(results)
        found = results()
    CANDIDATE.undo(on, applied)
    assert call.backend == "fa4"
    for one, other in zip(found, exact, strict=True):
        assert sqnr_db(other, one) > 40
    with preferring("flash"):
        (call,) = observe_attention(results)
    assert call.backend == "flash"


def test_the_glue_of_torch_for_flash_attention_4_unpacks_what_ours_returns() -> None:
    from torch.nn.attention import _fa4

    source = inspect.getsource(_fa4)
    assert "out, lse = module._flash_attn_fwd(" in source
    assert "dq, dk, dv = module._flash_attn_bwd(" in source
    assert "module_path" in inspect.signature(_fa4.register_flash_attention_fa4).parameters


@pytest.mark.skipif(bool(flash_package.available("fa3")), reason="FlashAttention 3 is installed")
def test_a_package_that_is_missing_leaves_torchs_kernel_in_force() -> None:
    with pytest.raises(ModuleNotFoundError):
        flash_package.activate("fa3")
    assert flash_package.running() is None
