"""A write to a weight is found, whichever way it went."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.validation.written import place, watch


def weights() -> list[Tensor]:
    return [
        nn.Parameter(torch.randn(100, 70)),
        nn.Parameter(torch.randn(3)),
        nn.Parameter(torch.tensor(2.0)),
        nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(5, 5).to(torch.bfloat16)),
        nn.Parameter(torch.randn(5, 5, dtype=torch.complex64)),
        nn.Parameter(torch.randn(16, 16).to(torch.float8_e4m3fn), requires_grad=False),
        nn.Parameter(torch.tensor([float("nan"), 1.0])),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.arange(6), requires_grad=False),
        nn.Parameter(torch.randn(1, 1, 64)),
        nn.Parameter(torch.randn(64, 3).t()),
    ]


def in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight.zero_()


def through_data(weight: Tensor) -> None:
    weight.data.copy_(weight.data.to(torch.complex64) + 1 if weight.is_complex() else weight.data.float() * 2 + 1)


def other_data(weight: Tensor) -> None:
    weight.data = (weight.data.float() * 2 + 1).to(weight.dtype) if not weight.is_complex() else weight.data + 1


@pytest.mark.parametrize("write", [in_place, through_data, other_data])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11])
def test_the_one_that_was_written_to_is_told(number: int, write: Callable[[Tensor], None]) -> None:
    found = weights()
    written = watch(found)
    assert written() is None
    write(found[number])
    assert written() is found[number]


def test_what_is_changed_and_put_back_through_data_was_not_written_to() -> None:
    found = weights()
    written = watch(found)
    copies = [each.data.clone() for each in found]
    for each, copy in zip(found, copies, strict=True):
        each.data = each.data.to(torch.float64) if each.is_floating_point() else each.data
        each.data = copy
    assert written() is None


def test_reading_and_training_passes_write_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    written = watch(list(model.parameters()))
    model(torch.ones(2, 4)).sum().backward()
    model.zero_grad()
    model.requires_grad_(False)
    assert written() is None


def test_tensors_without_memory_to_look_at_are_counted_alone() -> None:
    sparse, meta = torch.eye(3).to_sparse(), torch.ones(3, device="meta")
    with torch.inference_mode():
        made = torch.ones(3)
    assert watch([sparse, meta, made])() is None
    assert (place(sparse), place(meta)) == (None, None)


def test_two_names_of_one_memory_have_one_place() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    assert place(weight) == place(weight.data.t()) == place(weight.detach()[1:])
    assert place(weight) != place(weight.clone())
    assert place(torch.empty(0)) is None
