"""A plan is data: it survives storage and is printed whole."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Accepted, Rejected
from kpt_lightning.hardware import HardwareProfile
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.rules import make_plan

PROFILES = Path(__file__).parents[1] / "hardware" / "profiles"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2048, 8192, device="meta"), nn.Linear(8192, 2048, device="meta")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(2048, 50, device="meta")


def made(machine: str = "h100", **settings: Any) -> Plan:
    profile = HardwareProfile.load(PROFILES / f"{machine}.json")
    plan = make_plan(Model(), KptConfig.build(settings), profile, parallel=Accepted("parallel ddp", "by device count"))
    plan.proofs += [Accepted("fp8 calls", "72 FP8 GEMMs"), Rejected("fp8 kernels", "another [profiler] is running")]
    return plan


SETTINGS = [{}, {"level": "aggressive", "float8": {"recipe": "rowwise", "exclude": ["*.up"]}}, {"precision": "32"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_plan_survives_json_and_a_checkpoint_read_with_weights_only(settings: dict[str, Any]) -> None:
    plan = made(**settings)
    data = plan.to_dict()
    buffer = io.BytesIO()
    torch.save({"plan": data}, buffer)
    buffer.seek(0)
    for stored in (json.loads(json.dumps(data)), torch.load(buffer, weights_only=True)["plan"]):
        assert stored == data
        assert Plan.from_dict(stored) == plan


@pytest.mark.parametrize("machine", ["h100", "a100", "cpu_only"])
@pytest.mark.parametrize("columns", [80, 120])
def test_at_any_width_every_word_of_every_reason_is_printed(machine: str, columns: int) -> None:
    plan = made(machine)
    console = Console(width=columns, file=io.StringIO(), color_system=None)
    console.print(plan.render())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line) for line in text.splitlines()) <= columns
    assert "…" not in text
    words = {word.strip(":,()") for word in text.replace("│", " ").replace("┃", " ").split()}
    shown = [*plan.choices, *plan.layers[::6], *plan.blocks[:1], *plan.proofs]
    stripped = {word.strip(":,()") for each in shown for word in each.reason.split()}
    long = stripped - words
    # A word of its own longer than the column is folded, not cut.
    squeezed = "".join(text.split()).replace("│", "").replace("┃", "")
    assert all(len(word) > 15 for word in long), long
    assert squeezed.count("[profiler]") == 1


def test_layers_and_blocks_alike_are_one_row_with_their_number() -> None:
    plan = made()
    console = Console(width=200, file=io.StringIO(), color_system=None)
    console.print(plan.render())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for row in (
        "24 linear layers: *.up, *.down",
        "1 linear layer: head",
        "12 blocks: blocks.*",
    ):
        assert text.count(row) == 1


def test_the_summary_is_one_line_with_the_numbers() -> None:
    name = "NVIDIA H100 80GB HBM3"
    assert made().summary() == f"fp8, ddp, on {name}; 24 of 25 linear layers in FP8 (tensorwise); 12 blocks compiled"
    assert made(precision="32", compile={"blocks": False}).summary() == f"32, ddp, on {name}"


def test_explain_gives_every_decision_about_a_name() -> None:
    plan = made()
    assert [bool(each) for each in plan.explain("head")] == [False]
    assert [each.reason for each in plan.explain("blocks.3.up")] == ["2048 -> 8192"]
    assert plan.explain("nothing") == []
    assert plan.accepts("compile blocks")
    assert not plan.accepts("compile loss")
