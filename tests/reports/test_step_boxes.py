"""The steps within each run as boxes: what each record tells, and nothing that it does not."""

import random
import re
from dataclasses import replace

import pytest

from kpt_lightning.reports.elements import to_html
from kpt_lightning.reports.histories import histories
from kpt_lightning.reports.key_section import key_section
from kpt_lightning.reports.numbers import MINUS, Scale
from kpt_lightning.reports.small_charts import SPREAD_RUNS
from kpt_lightning.reports.step_boxes import Box, box_chart, box_legend, boxes_of, in_words
from kpt_lightning.tracking.record import Metric, RunRecord
from tests.reports.demo_history import QUANTILES_SINCE, STEADY_KEY, run

STEP = Metric(median=0.1, unit="s", better="lower", n=200, mad=0.001, quantiles=(0.098, 0.0992, 0.1, 0.101, 0.105))
MILLISECONDS = Scale.of([0.1], "s")


def history(*metrics: Metric) -> list[RunRecord]:
    """Runs whose only metric is given."""
    chance = random.Random(1)
    made = (run(STEADY_KEY, number, 0.1, 1.0, chance) for number in range(len(metrics)))
    return [replace(record, metrics={"step_time": one}) for record, one in zip(made, metrics, strict=True)]


def boxes(*metrics: Metric, status: str = "finished") -> list[Box]:
    (of_key,) = histories([*history(*metrics[:-1]), replace(history(*metrics)[-1], status=status)])
    return boxes_of(of_key, of_key.metrics[0])


def section(records: list[RunRecord]) -> str:
    (of_key,) = histories(records)
    return to_html(key_section(of_key, 400, 20, ())).replace("\u00a0", " ")


def drawn(found: list[Box]) -> str:
    return to_html(box_chart(found, MILLISECONDS)).replace("\u00a0", " ")


def test_a_box_says_its_quantiles_and_how_many_steps() -> None:
    (box,) = boxes(STEP)
    assert (box.reach, box.half) == ((0.098, 0.105), (0.0992, 0.1, 0.101))
    said = "median 100.00 ms, half of 200 steps 99.20 to 101.00, 5 to 95 % 98.00 to 105.00 · run "
    assert said in drawn([box])


def test_an_older_record_among_newer_ones_is_the_half_that_it_kept() -> None:
    old, new = boxes(replace(STEP, quantiles=None), STEP)
    assert old.half == pytest.approx((0.099, 0.1, 0.101))
    assert (old.reach, new.reach) == (None, (0.098, 0.105))
    html = drawn([old, new])
    assert html.count('class="whisker"') == 4
    assert [kind.split() for kind in re.findall(r'class="mark (box[^"]*)"', html)] == [
        ["box", "older"],
        ["box", "newest"],
    ]
    assert "older record" in to_html(box_legend([old, new]))
    assert "older record" not in to_html(box_legend([new]))


def test_a_history_of_older_records_keeps_its_bars() -> None:
    html = section(history(*[replace(STEP, quantiles=None)] * 3))
    assert html.count('class="mark bar') == 3
    assert "mark box" not in html
    assert "Half of the steps of a run lie within this of their median. Newest run: ±1.00 %" in html
    assert section(history(STEP, STEP, STEP)).count('class="mark box') == 3


def test_only_the_newest_runs_are_drawn_and_the_last_is_marked() -> None:
    found = boxes(*[STEP] * (SPREAD_RUNS + 5))
    assert len(found) == SPREAD_RUNS
    html = drawn(found)
    assert html.count("newest") == 1
    assert html.count('tabindex="0"') == 1


def test_the_words_compare_the_newest_run_with_those_before() -> None:
    wide = replace(STEP, quantiles=(0.09, 0.095, 0.1, 0.11, 0.13))
    said = in_words(boxes(STEP, STEP, wide)).replace("\u00a0", " ").replace(MINUS, "-")
    assert said == (
        "Nine of ten steps of the newest run lie within -10.0 % to +30.0 % of their median; "
        "in 2 runs before within -2.0 % to +5.0 %."
    )
    assert in_words(boxes(STEP)).count("before") == 0
    assert in_words(boxes(STEP, replace(STEP, quantiles=None))) == ""


@pytest.mark.parametrize("middle", [0.0, -0.1])
def test_levels_of_zero_and_below_are_drawn(middle: float) -> None:
    wait = replace(STEP, median=middle, quantiles=(middle, middle, middle, middle + 0.01, middle + 0.2))
    found = boxes(wait, wait)
    assert drawn(found).count('class="mark box') == 2
    assert bool(in_words(found)) == bool(middle)


def test_an_end_far_beyond_the_others_has_no_cap_and_does_not_flatten_them() -> None:
    far = replace(STEP, quantiles=(0.098, 0.0992, 0.1, 0.101, 90.0))
    html = drawn(boxes(*[STEP] * 29, far))
    assert html.count('class="whisker"') == 30 * 4 - 1
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" class="half"', html)]
    assert min(heights) > 5


@pytest.mark.parametrize(
    "broken",
    [
        replace(STEP, unit="min"),
        replace(STEP, quantiles=(0.1, 0.1, 0.1, 0.1, float("inf")), mad=None),
        replace(STEP, quantiles=None, mad=None),
    ],
)
def test_what_cannot_be_drawn_is_left_out(broken: Metric) -> None:
    assert len(boxes(STEP, broken, STEP, STEP)) == 3


def test_a_run_that_did_not_finish_has_no_box() -> None:
    assert len(boxes(STEP, STEP, status="interrupted")) == 1


def test_two_runs_are_no_two_walls() -> None:
    (width, _) = re.findall(r'width="([\d.]+)%"[^>]* class="half"', drawn(boxes(STEP, STEP)))
    assert float(width) < 5


def test_the_demo_has_records_of_both_kinds() -> None:
    chance = random.Random(1)
    kinds = [
        run(STEADY_KEY, number, 0.1, 1.0, chance).metrics["step_time"].quantiles is None
        for number in (QUANTILES_SINCE - 1, QUANTILES_SINCE)
    ]
    assert kinds == [True, False]
