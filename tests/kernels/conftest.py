"""What the tests of kernels share: where they run, and memory that shows what was not written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="Triton's interpreter is on only where there is no GPU"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.sm89),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of fresh memory is 0x7f, which is NaN in every dtype here: what is not written is seen."""
    empty: Callable[..., Tensor] = torch.empty

    def filled(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        made.untyped_storage().fill_(0x7F)
        return made

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def interpreter_counts_with_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter bounds loops by arrays of one element, which NumPy 2.4 takes for no numbers."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="the kernels are written in Triton")
    original = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
