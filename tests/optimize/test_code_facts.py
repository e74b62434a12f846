"""The code that a plan was proved against: an edit of a rule is seen, and what changes nothing is not."""

import functools
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpt_lightning.optimize.code_facts import code_facts
from kpt_lightning.optimize.driven import drive
from tests.optimize.faults import subject

NORM = """
import torch
from torch import nn
SCALE = 2.0
def rule(x, w):
    return x * w
class Helper:
    def __call__(self, x):
        return x + 1
class Norm(nn.Module):
    eps = 1e-5
    helper = Helper
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
    def scaled(self, x):
        return x * SCALE
    @torch.no_grad()
    def quiet(self, x):
        return x
    @property
    def half(self):
        return 0.5
    def forward(self, x, shift=0):
        return rule(self.scaled(x), self.w) if set(x.shape) & {1, 2, 3} else x
"""


def made(source: str = NORM) -> Any:
    names: dict[str, Any] = {"__name__": "of_a_user"}
    exec(compile(source, "of_a_user.py", "exec"), names)
    return names


def facts(source: str = NORM) -> str:
    return code_facts(made(source)["Norm"]())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return x * w", "return x * (1 + w)"),
        ("x * SCALE", "x / SCALE"),
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("shift=0", "shift=1"),
        ("eps = 1e-5", "eps = 1e-6"),
        ("{1, 2, 3}", "{1, 2, 4}"),
        ("        return x\n    @property", "        return -x\n    @property"),
        ("return 0.5", "return 0.25"),
    ],
)
def test_an_edit_that_changes_what_runs_is_seen(old: str, new: str) -> None:
    assert old in NORM
    assert facts(NORM.replace(old, new)) != facts()


def test_comments_and_lines_do_not_count_and_neither_does_driving() -> None:
    assert facts("# a comment\n\n" + NORM.replace("class Norm", "# another\nclass Norm")) == facts()
    model = nn.Sequential(made()["Norm"]())
    before = code_facts(model)
    undo = drive(model, subject(model))
    assert code_facts(model) == before
    undo()


def test_a_forward_or_a_hook_put_on_a_module_is_seen() -> None:
    found = {code_facts(nn.Linear(2, 2))}
    replaced, hooked = nn.Linear(2, 2), nn.Linear(2, 2)
    replaced.forward = lambda x: 2 * x  # type: ignore[assignment, method-assign]
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    found |= {code_facts(replaced), code_facts(hooked)}
    assert len(found) == 3


def scaled(by: float) -> Callable[..., Tensor]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return by * F.mse_loss(model(batch), batch)

    return loss


class OwnLoss(nn.Module):
    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return (one - two).abs().mean()


class OtherLoss(nn.Module):
    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return (one - two).square().mean()


def test_losses_differ_by_their_code_their_closure_and_their_arguments() -> None:
    losses = [
        scaled(1.0), scaled(2.0), functools.partial(scaled(1.0), batch=3), functools.partial(scaled(1.0), batch=4),
        OwnLoss(), OtherLoss(), lambda model, batch: model(batch).mean(), lambda model, batch: model(batch).sum(),
    ]  # fmt: skip
    assert len({code_facts(nn.Identity(), each) for each in losses}) == len(losses)
    assert code_facts(nn.Identity(), scaled(1.0)) == code_facts(nn.Identity(), scaled(1.0))


def test_it_is_the_same_in_another_process(tmp_path: Path) -> None:
    lines = """
        from tests.optimize.test_code_facts import facts
        print(facts())
    """
    command = [sys.executable, "-c", textwrap.dedent(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == facts()


def test_running_a_model_does_not_change_it() -> None:
    model = made()["Norm"]()
    before = code_facts(model)
    for _ in range(20):
        model(torch.ones(4))
    assert code_facts(model) == before
