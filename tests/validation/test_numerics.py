"""SQNR and relative error by their closed forms."""

import math

import pytest
import torch

from kpt_lightning.validation.numerics import relative_error, sqnr_db


@pytest.mark.parametrize(("error", "decibel"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0), (2.0, -20 * math.log10(2))])
def test_sqnr_of_a_relative_error_is_its_negative_decibel(error: float, decibel: float) -> None:
    x = torch.randn(3, 5)
    assert sqnr_db(x, x * (1 + error)) == pytest.approx(decibel, abs=1e-4)
    assert relative_error(x, x * (1 - error)) == pytest.approx(error, rel=1e-5)


def test_equal_tensors_have_infinite_sqnr_and_no_error() -> None:
    x = torch.randn(7)
    assert sqnr_db(x, x.clone()) == math.inf
    assert relative_error(x, x.clone()) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_or_an_infinity_on_either_side_passes_no_threshold(value: float) -> None:
    x, broken = torch.ones(4), torch.tensor([1.0, value, 1.0, 1.0])
    for pair in ((x, broken), (broken, x), (broken, broken)):
        assert not sqnr_db(*pair) > 20


def test_two_types_are_compared_in_double_precision() -> None:
    x = torch.full((4,), 1.0, dtype=torch.float64)
    assert sqnr_db(x, x + 1e-12) == pytest.approx(240, abs=0.1)
    assert sqnr_db(x, torch.full((4,), 1.0078125, dtype=torch.bfloat16)) == pytest.approx(42.14, abs=0.01)


def test_an_approximation_of_zero_that_is_not_zero_passes_no_threshold() -> None:
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
