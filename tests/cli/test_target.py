"""FILE:FUNCTION names what a command works on."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kpt_lightning.cli.target import load_target
from kpt_lightning.errors import ConfigError

TEXT = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

import {sibling}

@dataclass
class Settings:
    size: "int" = {sibling}.SIZE

def model():
    return nn.Linear(Settings().size, 2)

def pair():
    import {sibling}_later
    return model(), (torch.ones(1, 3),)

def triple(size=3):
    return nn.Linear(size, 2), (torch.ones(1, size), torch.ones(1, 2)), F.mse_loss

def everything():
    net = model()
    return {{"model": net, "batch": torch.ones(1, 3), "optimizer": torch.optim.SGD(net.parameters(), 0.1)}}

class Holder:
    @staticmethod
    def make():
        return model()

VALUE = 3
A_MODEL = nn.Linear(1, 1)
def needs(argument): return model()
def wrong(): return 3
def nothing(): return None
def single(): return (model(),)
def loss_first(): return F.mse_loss, model()
def bad_key(): return {{"model": model(), "data": 1}}
def no_model(): return {{"batch": 1}}
def bad_optimizer(): return {{"model": model(), "optimizer": 0.1}}
def bad_loss(): return model(), 1, "mse"
def fails(): raise LookupError("the user's own")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with a name that would hide a module, and a sibling that it imports."""
    sibling = f"sibling_of_{tmp_path.name}"
    (tmp_path / f"{sibling}.py").write_text("SIZE = 3")
    (tmp_path / f"{sibling}_later.py").write_text("")
    (tmp_path / "json.py").write_text(TEXT.format(sibling=sibling))
    return tmp_path / "json.py"


@pytest.mark.parametrize(
    ("function", "has"),
    [
        ("model", {"model"}),
        ("Holder.make", {"model"}),
        ("pair", {"model", "batch"}),
        ("triple", {"model", "batch", "loss_fn"}),
        ("everything", {"model", "batch", "optimizer"}),
    ],
)
def test_each_form_of_return_is_read_and_the_path_is_as_before(file: Path, function: str, has: set[str]) -> None:
    before, real = list(sys.path), sys.modules["json"]
    target = load_target(f"{file}:{function}")
    assert {name for name in ("model", "batch", "loss_fn", "optimizer") if getattr(target, name) is not None} == has
    assert isinstance(target.model, nn.Linear)
    assert target.model.in_features == 3
    assert target.loss_fn in (None, F.mse_loss)
    assert sys.path == before
    assert sys.modules["json"] is real


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nosuch", "there is no 'nosuch' in it. Functions there: model, pair, triple"),
        ("Holder.nosuch", "there is no 'Holder.nosuch' in it"),
        ("VALUE", "'VALUE' is an int, no function"),
        ("A_MODEL", "'A_MODEL' is a Linear, no function"),
        ("needs", "'needs' cannot be called without arguments (missing a required argument: 'argument')"),
        ("wrong", "it returned an int. Return a model, (model, batch)"),
        ("nothing", "it returned None"),
        ("single", "it returned a tuple of 1"),
        ("loss_first", "its model is a function"),
        ("bad_key", "it returned a dict with 'data'"),
        ("no_model", "its model is None"),
        ("bad_optimizer", "its optimizer is a float"),
        ("bad_loss", "its loss_fn is a str"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(file: Path, function: str, said: str) -> None:
    before = list(sys.path)
    with pytest.raises(ConfigError) as caught:
        load_target(f"{file}:{function}")
    assert f"target={f'{file}:{function}'!r}: {said}" in str(caught.value)
    assert sys.path == before


def test_what_is_wrong_with_a_name_is_said(file: Path) -> None:
    for name, said in (
        (str(file), "names no function"),
        (":f", "names no function"),
        (f"{file.with_name('absent.py')}:f", "there is no file"),
        ("no_such_package_here.module:f", "there is no module 'no_such_package_here'"),
        ("json.no_such_module:f", "there is no module 'json.no_such_module'"),
        ("json:dumps", "'dumps' cannot be called without arguments"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_target(name)


def test_a_module_is_found_in_the_working_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = file.with_name("kpt_target_package")
    package.mkdir()
    (package / "train.py").write_text(file.read_text())
    monkeypatch.chdir(file.parent)
    target = load_target("kpt_target_package.train:pair")
    assert torch.equal(target.batch[0], torch.ones(1, 3))


def test_errors_of_the_users_own_code_are_passed_on_and_leave_nothing_behind(file: Path) -> None:
    broken = file.with_name("broken.py")
    broken.write_text("import not_installed_anywhere")
    before, known = list(sys.path), set(sys.modules)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_target(f"{broken}:f")
    assert set(sys.modules) == known
    with pytest.raises(LookupError, match="the user's own"):
        load_target(f"{file}:fails")
    assert sys.path == before
