"""A set of changes is applied in one order, undone in reverse, and leaves nothing behind when one fails."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.optimize.apply import applied, key_of


class Logged:
    """A candidate that writes down what is done, and with which key."""

    def __init__(self, name: str, stage: Stage, turn: int, log: list[str], *, fails: str = "") -> None:
        self.name, self.stage, self.turn, self.log, self.fails = name, stage, turn, log, fails

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> str:
        if self.fails == "apply":
            raise RuntimeError(f"{self.name} cannot")
        self.log.append(f"+{self.name}")
        return f"state of {self.name}"

    def undo(self, subject: Subject, state: str) -> None:
        assert state == f"state of {self.name}"
        self.log.append(f"-{self.name}")
        if self.fails == "undo":
            raise RuntimeError(f"{self.name} stays")


def subject() -> Subject:
    return Subject(model=nn.Linear(2, 2), profile=detect(), config=KptConfig(), device=torch.device("cpu"))


def pool(log: list[str], fails: Mapping[str, str] | None = None) -> dict[str, Any]:
    made = [
        ("compile", Stage.COMPILE, 10),
        ("norm", Stage.MODULES, 40),
        ("mlp", Stage.MODULES, 41),
        ("fp8", Stage.WEIGHTS, 20),
        ("adam", Stage.OPTIMIZER, 1),
    ]
    return {name: Logged(name, stage, turn, log, fails=(fails or {}).get(name, "")) for name, stage, turn in made}


def changes(*names: str) -> list[Change]:
    return [Change(candidate=name, setting={"of": name}) for name in names]


def use(known: Subject, wanted: Sequence[Change], lookup: dict[str, Any], error: BaseException | None = None) -> None:
    with applied(known, wanted, lookup.__getitem__):
        if error is not None:
            raise error


@pytest.mark.parametrize(
    "names", [("compile", "norm", "adam", "mlp", "fp8"), ("adam", "fp8", "mlp", "norm", "compile")]
)
def test_the_order_is_by_stage_and_turn_whatever_the_plan_says_and_undone_in_reverse(names: tuple[str, ...]) -> None:
    log: list[str] = []
    known = subject()
    with applied(known, changes(*names), pool(log).__getitem__):
        assert log == ["+fp8", "+norm", "+mlp", "+compile", "+adam"]
        assert known.applied == ["fp8", "norm", "mlp", "compile", "adam"]
    assert log[5:] == ["-adam", "-compile", "-mlp", "-norm", "-fp8"]
    assert (known.applied, known.key) == ([], "")


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt()])
def test_an_error_inside_undoes_all(error: BaseException) -> None:
    log: list[str] = []
    known = subject()
    with pytest.raises(type(error)):
        use(known, changes("norm", "fp8"), pool(log), error)
    assert log == ["+fp8", "+norm", "-norm", "-fp8"]
    assert (known.applied, known.key) == ([], "")


def test_a_change_that_cannot_be_applied_undoes_those_before_it_alone() -> None:
    log: list[str] = []
    known = subject()
    with pytest.raises(RuntimeError, match="mlp cannot"):
        use(known, changes("compile", "mlp", "norm", "fp8"), pool(log, {"mlp": "apply"}))
    assert log == ["+fp8", "+norm", "-norm", "-fp8"]
    assert (known.applied, known.key) == ([], "")


def test_a_change_that_cannot_be_undone_does_not_keep_others() -> None:
    log: list[str] = []
    known = subject()
    with pytest.raises(RuntimeError, match="norm stays"):
        use(known, changes("compile", "norm", "fp8"), pool(log, {"norm": "undo"}))
    assert log == ["+fp8", "+norm", "+compile", "-compile", "-norm", "-fp8"]
    assert (known.applied, known.key) == ([], "")


def test_an_unknown_candidate_changes_nothing() -> None:
    known = subject()
    with pytest.raises(ConfigError, match="'gone': is not known here"), applied(known, changes("gone")):
        pass
    assert (known.applied, known.key) == ([], "")


def test_one_set_within_another_has_its_own_key_and_gives_the_outer_one_back() -> None:
    log: list[str] = []
    known, lookup = subject(), pool(log).__getitem__
    with applied(known, changes("fp8"), lookup):
        outer = known.key
        with applied(known, changes("norm"), lookup):
            assert known.applied == ["fp8", "norm"]
            assert known.key != outer
        assert (known.key, known.applied) == (outer, ["fp8"])


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        (("fp8", "norm"), ("norm", "fp8"), True),
        (("fp8", "norm"), ("fp8",), False),
        (("fp8",), (), False),
        # Compiled code does not hold what comes after it, nor itself.
        (("fp8", "compile"), ("fp8",), True),
        (("fp8", "adam"), ("fp8",), True),
        (("compile",), (), True),
    ],
)
def test_the_key_is_that_of_what_compiled_code_sees(one: tuple[str, ...], two: tuple[str, ...], same: bool) -> None:
    keys = []
    for names in (one, two):
        known = subject()
        with applied(known, changes(*names), pool([]).__getitem__):
            keys.append(known.key)
    assert (keys[0] == keys[1]) is same


def test_keys_differ_by_setting_and_not_by_the_order_in_it() -> None:
    def key(**setting: Any) -> str:
        return key_of([Change(candidate="a", setting=setting)])

    assert key(x=1, y=[2]) == key(y=[2], x=1)
    assert key(x=1) != key(x=2) != key()
    assert key_of([]) == ""
    # A candidate of another package may hold more than JSON.
    assert key(dtype=torch.bfloat16) != key(dtype=torch.float16)
