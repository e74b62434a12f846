"""Head and loss as one: loss and every gradient are those of PyTorch, chunk by chunk."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kpt_lightning.kernels.linear_cross_entropy import chunk_size, linear_cross_entropy
from kpt_lightning.validation.numerics import relative_error

IGNORED = -100
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
ROWS, FEATURES, CLASSES = 37, 24, 83


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def problem(
    dtype: torch.dtype, device: str, weight_dtype: torch.dtype | None = None, rows: int = ROWS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and labels, of which some are ignored."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, of: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, of).requires_grad_()

    hidden = random(rows, FEATURES, of=dtype)
    weight, bias = (random(*shape, of=weight_dtype or dtype) for shape in ((CLASSES, FEATURES), (CLASSES,)))
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    labels[::4] = IGNORED
    return hidden, weight, bias, labels.to(device)


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **settings: Any) -> Tensor:
    """As transformers computes it."""
    items = settings.pop("num_items", None)
    loss = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, **settings)
    return loss if items is None else loss / items


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss * 3.0, of))


SETTINGS: list[dict[str, Any]] = [
    {},
    dict(reduction="sum"),
    dict(reduction="sum", num_items=17),
    dict(reduction="sum", num_items=torch.tensor(17)),
    dict(ignore_index=5),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 1, 10, 37, 64])
def test_loss_and_gradients_are_those_of_pytorch(settings: dict[str, Any], chunk_rows: int | None, device: str) -> None:
    hidden, weight, bias, labels = problem(torch.float32, device)
    if "ignore_index" in settings:
        labels = labels.clamp(min=5)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight, bias)]
    wanted = F.linear(*exact)
    plain = {key: value for key, value in settings.items() if key != "num_items"}
    wanted_loss = F.cross_entropy(wanted, labels, **plain) / settings.get("num_items", 1)
    loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_rows=chunk_rows, **settings)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert relative_error(wanted_loss, loss) < 1e-6
    found, expected = gradients(loss, hidden, weight, bias), gradients(wanted_loss, *exact)
    for own, other, like in zip(found, expected, (hidden, weight, bias), strict=True):
        assert own.dtype == like.dtype
        assert relative_error(other, own) < 2e-6


@pytest.mark.parametrize(
    ("autocast", "dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (None, torch.bfloat16, torch.bfloat16),
        (None, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_in_16_bits_it_is_no_further_from_float64_than_pytorch(
    autocast: torch.dtype | None, dtype: torch.dtype, weight_dtype: torch.dtype, device: str
) -> None:
    hidden, weight, bias, labels = problem(dtype, device, weight_dtype)
    inputs = (hidden, weight, bias)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    wanted = reference(exact[0], exact[1], labels, exact[2])
    with torch.autocast(device, autocast, enabled=autocast is not None):
        plain = reference(hidden, weight, labels, bias)
        fused = linear_cross_entropy(hidden, weight, labels, bias, chunk_rows=10)
    assert abs(fused - wanted) <= 2 * abs(plain - wanted) + 1e-3
    names = zip(gradients(wanted, *exact), gradients(plain, *inputs), gradients(fused, *inputs), inputs, strict=True)
    for truth, own, found, like in names:
        assert found.dtype == like.dtype
        assert relative_error(truth, found) <= 1.5 * relative_error(truth, own) + 1e-6


def test_fp16_keeps_gradients_that_a_mean_over_the_rows_would_make_zero() -> None:
    hidden, weight, _, labels = problem(torch.float16, "cpu")
    hidden, labels = hidden.detach().repeat(200, 1).requires_grad_(), labels.repeat(200)
    weight = (weight.detach() / 4).requires_grad_()
    exact = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(hidden.double(), exact, labels), exact)
    (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), weight)
    assert relative_error(wanted, found) < 5e-3


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_the_gradients_that_are_wanted_are_made(trained: str) -> None:
    parts = dict(zip(("hidden", "weight", "bias", "labels"), problem(torch.float32, "cpu"), strict=True))
    for name in ("hidden", "weight", "bias"):
        parts[name].requires_grad_(name == trained)
    loss = linear_cross_entropy(**parts, chunk_rows=10)
    saved = [each for each in loss.grad_fn.saved_tensors[:3] if each is not None]
    assert [each.shape for each in saved] == [parts[trained].shape]
    (found,) = torch.autograd.grad(loss, parts[trained])
    (wanted,) = torch.autograd.grad(reference(**parts), parts[trained])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, bias, labels = problem(torch.float32, "cpu")
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(hidden, weight, labels, bias).detach())


def test_no_tensor_of_the_size_of_all_logits_exists() -> None:
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for each in torch.utils._pytree.tree_leaves(out):
                if isinstance(each, Tensor):
                    self.largest = max(self.largest, each.numel())
            return out

    hidden, weight, bias, labels = problem(torch.float32, "cpu", rows=200)
    with Watch() as watch:
        linear_cross_entropy(hidden, weight, labels, bias, chunk_rows=20).backward()
    assert watch.largest <= max(20 * CLASSES, 200 * FEATURES)


def test_a_tied_weight_gets_both_its_gradients() -> None:
    _, weight, _, labels = problem(torch.float32, "cpu")
    tokens = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(2))
    (wanted,) = torch.autograd.grad(reference(F.embedding(tokens, weight), weight, labels), weight)
    (found,) = torch.autograd.grad(linear_cross_entropy(F.embedding(tokens, weight), weight, labels), weight)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 5])
def test_without_a_row_that_counts_the_mean_is_nan_and_gradients_are_zero_as_in_pytorch(rows: int) -> None:
    hidden, weight, _, labels = problem(torch.float32, "cpu", rows=rows)
    labels = torch.full_like(labels, IGNORED)
    for loss in (reference(hidden, weight, labels), linear_cross_entropy(hidden, weight, labels)):
        assert loss.isnan()
        for grad in torch.autograd.grad(loss, [hidden, weight]):
            assert not grad.any()
    assert linear_cross_entropy(hidden, weight, labels, reduction="sum") == 0


def test_nan_in_a_hidden_state_comes_out_in_loss_and_gradient() -> None:
    hidden, weight, _, labels = problem(torch.float32, "cpu")
    with torch.no_grad():
        hidden[1, 0] = torch.nan
    loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=10)
    assert loss.isnan()
    grad_hidden, grad_weight = torch.autograd.grad(loss, [hidden, weight])
    assert grad_hidden[1].isnan().all()
    assert grad_weight.isnan().any()


def test_backward_runs_twice_with_the_same_bits_where_the_graph_is_kept() -> None:
    hidden, weight, _, labels = problem(torch.bfloat16, "cpu")
    loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=10)
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, [hidden, weight]), strict=True):
        assert torch.equal(one, two)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, _, labels = problem(torch.float32, "cpu")
    loss = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_compiled_code_calls_it_as_it_is_and_keeps_the_gradients() -> None:
    hidden, weight, _, labels = problem(torch.float32, "cpu")

    def model(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, labels, chunk_rows=10) + 1

    wanted = torch.autograd.grad(model(hidden, weight, labels), [hidden, weight])
    compiled = torch.compile(model, backend="aot_eager")
    for one, two in zip(
        wanted, torch.autograd.grad(compiled(hidden, weight, labels), [hidden, weight]), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("rows", "classes", "chunks"), [(16384, 128256, 4), (16384, 32000, 1), (4096, 256000, 2), (100, 50, 1)]
)
def test_chunks_are_even_and_their_logits_about_a_gibibyte(rows: int, classes: int, chunks: int) -> None:
    size = chunk_size(rows, classes, None)
    assert -(-rows // size) == chunks
    assert size * classes * 2 <= 1.1 * 2**30
    assert size % 128 == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(reduction="none"), "reduction"),
        (dict(num_items=3), "num_items"),
        (dict(chunk_rows=0), "chunk_rows"),
        (dict(weight=torch.zeros(5, 3)), r"\(N, H\) and \(V, H\)"),
        (dict(labels=torch.zeros(3, dtype=torch.int64)), "one for each"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(change: dict[str, Any], match: str) -> None:
    hidden, weight, _, labels = problem(torch.float32, "cpu")
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(**(dict(hidden=hidden, weight=weight, labels=labels) | change))
