"""The table of a check at the widths that terminals have."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from kpt_lightning.reports.findings import describe
from kpt_lightning.reports.terminal import PLAIN_WIDTH, to_terminal, to_text
from kpt_lightning.tracking.review import Review
from tests.reports.demo_history import demo_history
from tests.reports.test_findings import ODD, slower, told

FOUND = told(demo_history(), accepted=())


def lines(width: int, *, fold: bool = True, color: bool = False) -> list[str]:
    console = Console(
        file=io.StringIO(), width=width, color_system="truecolor" if color else None, force_terminal=color,
        no_color=not color,
    )  # fmt: skip
    with console.capture() as capture:
        console.print(to_terminal(FOUND, width, fold=fold))
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("fold", [True, False])
def test_it_fits_and_no_number_is_broken(width: int, fold: bool) -> None:
    shown = lines(width, fold=fold)
    assert max(map(cell_len, shown)) <= width
    text = "\n".join(shown)
    for each in FOUND:
        if not fold or each.state == "failing":
            assert all(number in text for number in (each.before, each.now, each.change, each.interval))


@pytest.mark.parametrize("width", [120, 150, 200])
def test_each_metric_is_one_line_that_does_not_repeat_the_level_of_confidence(width: int) -> None:
    shown = lines(width, fold=False)
    heads = [line for line in shown if "95% interval" in line]
    assert len(heads) == 3
    assert len({line.index("verdict") for line in heads}) == 1
    rows = [line for line in shown if line.endswith(("  pass", "  moderate regression"))]
    assert len(rows) == 21
    assert all(line.startswith("  ") for line in rows)


def test_a_history_of_21_metrics_fits_a_screen_and_the_worst_key_is_its_first() -> None:
    shown = lines(120)
    assert len(shown) <= 20
    assert [line.partition(":")[0] for line in shown if " key " in line] == [
        "finetune-8b-lora", "pretrain-1b", "encoder",
    ]  # fmt: skip
    assert sum("the environment changed" in line for line in shown) == 1


def test_colour_marks_the_verdict_and_says_nothing_alone() -> None:
    colored = [line for line in lines(120, color=True) if "\x1b[1;31m" in line]
    assert len(colored) == 3
    assert all("moderate regression" in line for line in colored)


def test_a_log_has_no_colour_and_no_spaces_at_the_ends_of_lines() -> None:
    text = to_text(FOUND)
    assert "\x1b" not in text
    assert all(line == line.rstrip() and len(line) <= PLAIN_WIDTH for line in text.splitlines())
    assert to_text([]).strip() == "Newest runs against those before"


@pytest.mark.parametrize("name", ODD)
def test_no_name_commands_the_terminal_or_is_read_as_markup(name: str) -> None:
    text = to_text(told(slower(name)))
    assert "\x1b" not in text
    assert told(slower(name))[0].name.strip() in text
    many = describe(Review(records=(), found=tuple(each.checked for each in told(slower("[red]"))), alerts=()), "minor")
    assert "[red]" in to_text(many)
