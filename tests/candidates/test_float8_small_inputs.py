"""Inputs that are not worth the launches of the FP8 kernels run layer by layer, with the layers' own numbers."""

from typing import Any

import pytest
import torch

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.candidates.float8_mlp import CANDIDATE as MLP
from kpt_lightning.candidates.float8_siblings import CANDIDATE as SIBLINGS
from kpt_lightning.precision import kernel_sizes
from kpt_lightning.precision.gemm import count_gemms
from tests.candidates.float8_llama import gradients, in_float8, llama, passes

# Of the test's model: 2 x 24 tokens of 64 features.
ELEMENTS = 2 * 24 * 64


def applied(subject: Any) -> Any:
    """Both candidates, one after the other."""
    done = []
    for candidate in (MLP, SIBLINGS):
        change = next(each for each in candidate.applies(subject) if isinstance(each, Change))
        assert f"{kernel_sizes.LEAST_ELEMENTS:,} elements and more" in change.reason
        done.append((candidate, candidate.apply(subject, change.setting)))
    return done


@pytest.mark.parametrize(("least", "merged"), [(ELEMENTS + 1, False), (ELEMENTS, True)])
def test_the_size_of_the_input_decides(monkeypatch: pytest.MonkeyPatch, least: int, merged: bool) -> None:
    model = llama()
    run = passes(model)
    subject = in_float8(model, run, small=False)
    layers = gradients(model, run)
    done = applied(subject)
    monkeypatch.setattr(kernel_sizes, "LEAST_ELEMENTS", least)
    with count_gemms() as counts:
        found = gradients(model, run)
    assert bool(counts.merged) is merged
    assert all(torch.equal(each, found[name]) for name, each in layers.items()) is not merged
    for candidate, what in reversed(done):
        candidate.undo(subject, what)


def test_a_check_looks_at_the_kernels_whatever_the_size() -> None:
    model = llama()
    run = passes(model)
    subject = in_float8(model, run)
    change = next(each for each in MLP.applies(subject) if isinstance(each, Change))
    what = MLP.apply(subject, change.setting)
    with count_gemms() as counts:
        verdict = MLP.check(subject, run)
    assert verdict, verdict.reason
    assert counts.merged
    MLP.undo(subject, what)


def test_every_size_ends_with_its_block_also_after_an_error() -> None:
    few = torch.zeros(2, 3)

    def fail() -> None:
        with kernel_sizes.at_every_size():
            assert kernel_sizes.worth_kernels(few)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not kernel_sizes.worth_kernels(few)
