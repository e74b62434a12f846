"""Bars of a terminal show where values lie."""

import pytest

from kpt_lightning.reports.sparkline import sparkline


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([], ""), ([5.0], "▅"), ([1.0, 1.0], "▅▅"), ([0.0, 7.0], "▁█"), ([-1.0, 0.0, 1.0], "▁▅█"),
        ([-1.7e308, 1.7e308], "▁█"), ([0.0, 5e-324], "▅▅"),
    ],
)  # fmt: skip
def test_bars_span_the_smallest_to_the_largest(values: list[float], bars: str) -> None:
    assert sparkline(values) == bars
