from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.conftest import BENCHMARKS

pytestmark = pytest.mark.usefixtures("scripts")


def test_perfherders_rule_finds_a_clear_step_once_and_where_it_is() -> None:
    from perfherder_rule import perfherder_rule

    values = 100 + np.random.default_rng(0).standard_normal(50)
    assert perfherder_rule(values) == []
    values[25:] += 10
    assert perfherder_rule(values) == [25]


@pytest.mark.parametrize(("runs", "step"), [(23, 10.0), (50, 1.9)])
def test_perfherders_rule_needs_twelve_runs_a_side_and_two_percent(runs: int, step: float) -> None:
    from perfherder_rule import perfherder_rule

    values = 100 + 0.1 * np.random.default_rng(0).standard_normal(runs)
    values[runs // 2 :] += step
    assert perfherder_rule(values) == []


def test_a_cell_counts_histories_with_an_alarm() -> None:
    from detector_cells import Cell

    assert Cell("g", "n", [[0.0]] * 4).score([[], [3], [], [1, 2]]) == "50.0%"
    assert Cell("g", "n", [[0.0]] * 4, looks=2).score([[], [3], [], []]) == "50.0%"


def test_a_cell_counts_hits_within_two_and_all_alarms() -> None:
    from detector_cells import Cell

    cell = Cell("g", "n", [[0.0]] * 2, truth=[10, 10])
    assert cell.score([[12, 20], [13]]) == "50% (33.3%)"
    assert cell.score([[], []]) == "0% (-)"


def test_every_detector_gets_the_series_of_the_own_table() -> None:
    from detector_cells import simulated
    from detector_table import draw

    cells = list(simulated(3, 1))
    assert cells[0].series == draw("iid", 0.03, 3, 20).tolist()
    assert [len(values) for cell in cells if cell.looks > 1 for values in cell.series[:2]] == [21, 22] * 5
    assert all(len(cell.truth) in (0, 3) for cell in cells)


def test_the_recorded_real_series_are_cut_into_histories() -> None:
    from detector_cells import RUNS, real

    cells = list(real(BENCHMARKS / "results"))
    assert all(len(values) == RUNS for cell in cells if cell.looks == 1 for values in cell.series)
    assert all(value > 0.0 for cell in cells for values in cell.series for value in values)


def test_without_real_series_the_script_that_makes_them_is_named(tmp_path: Path) -> None:
    from detector_cells import real

    with pytest.raises(SystemExit, match="real_histories"):
        list(real(tmp_path))
