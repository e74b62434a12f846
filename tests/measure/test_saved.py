"""Bytes kept for the backward pass, each storage once."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kpt_lightning.measure.saved import peak_of, saved_bytes

KILO = 1000


def test_what_one_product_keeps_is_its_operands() -> None:
    a, b = (torch.randn(KILO, requires_grad=True) for _ in range(2))
    assert saved_bytes(lambda: (a * b).sum()) == 2 * 4 * KILO


def test_views_and_repeated_use_of_one_storage_count_once() -> None:
    a = torch.randn(KILO, requires_grad=True)
    assert saved_bytes(lambda: (a * a + a.view(10, 100).flatten() * a[:KILO]).sum()) == 4 * KILO


def test_nothing_is_kept_without_gradients() -> None:
    a = torch.randn(KILO, requires_grad=True)
    with torch.no_grad():
        assert saved_bytes(lambda: a * a) == 0


def test_checkpointing_keeps_less() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    x = torch.randn(256, 64, requires_grad=True)
    plain = saved_bytes(lambda: layers(x).sum())

    def recomputed() -> Tensor:
        out = x
        for layer in layers:
            out = checkpoint(layer, out, use_reentrant=False)
        return out.sum()

    activations = 256 * 64 * 4
    assert plain - saved_bytes(recomputed) >= 4 * activations


def test_sparse_operands_are_counted() -> None:
    matrix, x = torch.eye(KILO).to_sparse(), torch.randn(KILO, 1, requires_grad=True)
    # Two indices of 8 bytes and a value of 4 each.
    assert saved_bytes(lambda: torch.sparse.mm(matrix, x).sum()) >= KILO * (2 * 8 + 4)


def test_an_error_of_the_model_passes_through_and_the_hooks_are_gone() -> None:
    a = torch.randn(KILO, requires_grad=True)

    def fails() -> None:
        (a * a).sum()
        raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        saved_bytes(fails)
    (a * a).sum().backward()
    assert a.grad is not None


def test_a_cpu_does_not_tell_its_peak() -> None:
    assert peak_of(lambda: None, torch.device("cpu")) is None


@pytest.mark.cuda
def test_the_peak_of_a_gpu_holds_what_was_live_at_once() -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)

    def run() -> None:
        one = torch.empty(8 * 2**20, dtype=torch.uint8, device=device)
        two = torch.empty_like(one)
        del one, two
        torch.empty(2**20, dtype=torch.uint8, device=device)

    peak = peak_of(run, device)
    assert peak is not None
    assert 16 * 2**20 <= peak - before < 18 * 2**20
