"""What is observed is what ran: eager and compiled, forward only once, every flag."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from kpt_lightning.attention.observe import observe_attention
from kpt_lightning.errors import KptError

BATCH, HEADS, LENGTH, SIZE = 2, 4, 16, 8


def heads(count: int = HEADS, dtype: torch.dtype = torch.float32, device: str = "cpu", length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH, count, length, SIZE, dtype=dtype, device=device, requires_grad=True)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("backend", "name"), [(SDPBackend.FLASH_ATTENTION, "flash"), (SDPBackend.MATH, "math")])
def test_backend_sizes_dtype_and_flag_of_an_eager_call_are_seen(
    backend: SDPBackend, name: str, dtype: torch.dtype, causal: bool
) -> None:
    q, k = heads(dtype=dtype), heads(dtype=dtype)
    with sdpa_kernel(backend):
        calls = observe_attention(lambda: scaled_dot_product_attention(q, k, k, is_causal=causal).sum().backward())
    assert len(calls) == 1
    call = calls[0]
    assert (call.backend, call.causal, call.mask, call.dropout) == (name, causal, None, 0.0)
    assert call.query == call.key == (BATCH, HEADS, LENGTH, SIZE)
    assert call.dtype == str(dtype).removeprefix("torch.")


def test_dropout_is_seen_and_takes_the_math_backend_of_a_cpu() -> None:
    q = heads()
    (call,) = observe_attention(lambda: scaled_dot_product_attention(q, q, q, dropout_p=0.25))
    assert (call.backend, call.dropout) == ("math", 0.25)


@pytest.mark.parametrize("length", [LENGTH, 24])
def test_key_heads_and_another_number_of_keys_are_seen(length: int) -> None:
    q, k = heads(), heads(2, length=length)
    (call,) = observe_attention(lambda: scaled_dot_product_attention(q, k, k, enable_gqa=True))
    assert call.heads == (HEADS, 2)
    assert call.key == (BATCH, 2, length, SIZE)
    assert call.all_pairs_flops == 4 * BATCH * HEADS * LENGTH * length * SIZE


@pytest.mark.parametrize("shape", [(LENGTH, LENGTH), (BATCH, 1, LENGTH, LENGTH)])
def test_the_shape_of_a_mask_tensor_is_seen(shape: tuple[int, ...]) -> None:
    q, mask = heads(), torch.ones(shape, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH):
        (call,) = observe_attention(lambda: scaled_dot_product_attention(q, q, q, attn_mask=mask))
    assert call.mask == shape


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_in_the_backward_pass_is_left_out(reentrant: bool) -> None:
    q = heads()

    def run() -> None:
        out = checkpoint(lambda it: scaled_dot_product_attention(it, it, it), q, use_reentrant=reentrant)
        out.sum().backward()

    assert len(observe_attention(run)) == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_is_observed_as_it_runs_at_its_first_call_too() -> None:
    q, k = heads(), heads(2)
    mask = torch.randn(BATCH, 1, LENGTH, LENGTH)

    @torch.compile
    def attend(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(2 * q, k, k, attn_mask=mask, enable_gqa=True)

    first = observe_attention(lambda: attend(q, k, mask).sum().backward())
    second = observe_attention(lambda: attend(q, k, mask).sum().backward())
    assert first == second
    assert [(call.backend, call.causal, call.heads) for call in first] == [("flash", False, (HEADS, 2))]
    assert first[0].mask is not None
    assert first[0].mask[-2:] == (LENGTH, LENGTH)


def encoder(**settings: Any) -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    return nn.TransformerEncoder(layer, 2, **settings), torch.randn(2, LENGTH, 64), mask


def test_torch_itself_turns_the_dense_causal_mask_of_an_encoder_into_a_flag() -> None:
    model, x, mask = encoder()
    calls = observe_attention(lambda: model(x, mask=mask).sum().backward())
    assert [(call.causal, call.mask) for call in calls] == [(True, None)] * 2


def test_a_causal_mask_beside_a_padding_mask_stays_a_dense_tensor() -> None:
    model, x, mask = encoder()
    padding = torch.zeros(2, LENGTH)
    calls = observe_attention(lambda: model(x, mask=mask, src_key_padding_mask=padding).sum().backward())
    assert [(call.causal, call.mask) for call in calls] == [(False, (2, 4, LENGTH, LENGTH))] * 2


def test_attention_written_out_in_products_is_not_seen() -> None:
    q = heads()
    assert observe_attention(lambda: (q @ q.mT).softmax(-1) @ q) == []


class FlashAttnFunc(torch.autograd.Function):
    """Named as in the flash-attn packages, laid out (batch, sequence, heads, size)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * k * v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def test_a_call_of_a_flash_attention_package_is_seen_by_its_name_without_its_flag() -> None:
    q = torch.randn(2, 16, 4, 8, requires_grad=True)
    (call,) = observe_attention(lambda: FlashAttnFunc.apply(q, q, q).sum().backward())
    assert (call.backend, call.query, call.causal) == ("package", (2, 4, 16, 8), None)


def test_beside_another_profiler_it_says_so_and_leaves_that_one_alone() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as other:
        with pytest.raises(KptError, match="another profiler is running"):
            observe_attention(lambda: None)
        torch.ones(2).add(1)
    assert any(event.name == "aten::add" for event in other.events() or ())


def test_an_error_in_the_run_reaches_the_caller_and_ends_the_profiler() -> None:
    def run() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        observe_attention(run)
    assert not torch._C._autograd._profiler_enabled()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (SDPBackend.CUDNN_ATTENTION, "cudnn"),
        (SDPBackend.FLASH_ATTENTION, "flash"),
        (SDPBackend.EFFICIENT_ATTENTION, "efficient"),
        (SDPBackend.MATH, "math"),
    ],
)
def test_every_backend_of_cuda_is_told_apart(backend: SDPBackend, name: str) -> None:
    q = torch.randn(2, 4, 128, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    with sdpa_kernel(backend):
        calls = observe_attention(lambda: scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward())
    assert [(call.backend, call.causal, call.query) for call in calls] == [(name, True, (2, 4, 128, 64))]


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_attention_on_cuda_is_seen_with_its_mask() -> None:
    q = torch.randn(2, 4, 128, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    mask = torch.ones(128, 128, dtype=torch.bool, device="cuda").tril()
    attend: Callable[..., Tensor] = torch.compile(lambda q, mask: scaled_dot_product_attention(2 * q, q, q, mask))
    attend(q, mask).sum().backward()
    (call,) = observe_attention(lambda: attend(q, mask).sum().backward())
    assert call.backend in ("cudnn", "efficient")
    assert call.causal is False
    assert call.mask is not None
    assert call.mask[-2:] == (128, 128)
