"""A new candidate is one new file, or an entry point of another package, and nothing else."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kpt_lightning.candidates as package
from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Candidate, Stage
from kpt_lightning.config import Level
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.gates import Numerics

SOURCE = """
from kpt_lightning.candidates.candidate import Stage
from kpt_lightning.config import Level
from kpt_lightning.validation.gates import Numerics


class Extra:
    name = {name!r}
    level = Level.CONSERVATIVE
    stage = Stage.MODULES
    turn = {turn}
    numerics = Numerics.SAME
    features = ()
    packages = ()

    def applies(self, subject):
        return []

    def apply(self, subject, setting):
        return None

    def undo(self, subject, applied):
        pass


CANDIDATE = Extra()
NUMBER = 3
"""


@pytest.fixture(autouse=True)
def fresh_registry() -> Iterator[None]:
    registry._own.cache_clear()
    yield
    registry._own.cache_clear()


@pytest.fixture
def add_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Puts a file among the candidates of this package."""
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    added: list[str] = []

    def add(module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        added.append(module)

    yield add
    for module in added:
        sys.modules.pop(f"{package.__name__}.{module}", None)
        vars(package).pop(module, None)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], None]]:
    """Installs a distribution with one entry point in a directory of its own."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    modules: list[str] = []

    def add(module: str, source: str, value: str) -> None:
        (site / f"{module}.py").write_text(source, encoding="utf-8")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
        points = f"[{registry.ENTRY_POINTS}]\n{module}_point = {value}\n"
        (info / "entry_points.txt").write_text(points, encoding="utf-8")
        modules.append(module)

    yield add
    for module in modules:
        sys.modules.pop(module, None)


def names() -> list[str]:
    return [each.name for each in registry.candidates()]


def test_candidates_come_in_the_order_of_their_turn_and_each_has_a_name_of_its_own() -> None:
    found = registry.candidates()
    assert [(each.turn, each.name) for each in found] == sorted((each.turn, each.name) for each in found)
    assert len({each.name for each in found}) == len(found)
    assert {"float8", "compile_blocks", "autocast_bf16"} <= {each.name for each in found}


@pytest.mark.parametrize("each", registry.candidates(), ids=lambda each: each.name)
def test_each_candidate_describes_itself(each: Candidate) -> None:
    assert isinstance(each, Candidate)
    assert not isinstance(each, type)
    assert each.name.isidentifier()
    assert each.name == each.name.lower()
    assert isinstance(each.level, Level)
    assert isinstance(each.stage, Stage)
    assert isinstance(each.numerics, Numerics)
    assert all(isinstance(package, OptionalPackage) for package in each.packages)
    assert registry.candidate(each.name) is each
    # Found under its own name by whoever reads a plan.
    assert (Path(package.__path__[0]) / f"{each.name}.py").exists()


def test_a_new_file_is_found_by_itself(add_file: Callable[[str, str], None]) -> None:
    before = names()
    add_file("an_extra", SOURCE.format(name="an_extra", turn=0))
    registry._own.cache_clear()
    assert names() == ["an_extra", *before]


def test_a_file_without_a_candidate_is_none(add_file: Callable[[str, str], None]) -> None:
    before = names()
    add_file("a_helper", "NUMBER = 3\n")
    registry._own.cache_clear()
    assert names() == before


def test_another_package_offers_one_by_an_entry_point(install: Callable[[str, str, str], None]) -> None:
    before = names()
    install("kpt_foreign", SOURCE.format(name="foreign", turn=99), "kpt_foreign:CANDIDATE")
    assert names() == [*before, "foreign"]
    assert registry.candidate("foreign") is sys.modules["kpt_foreign"].CANDIDATE


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("kpt_foreign:NUMBER", "gives no candidate but int"),
        ("kpt_foreign:Extra", "gives no candidate but the class Extra"),
        ("kpt_foreign", "gives no candidate but module"),
        ("kpt_foreign:GONE", "cannot be loaded: AttributeError: .*GONE"),
        ("kpt_gone:CANDIDATE", "cannot be loaded: ModuleNotFoundError: No module named 'kpt_gone'"),
        ("kpt_foreign", "cannot be loaded: ZeroDivisionError"),
        ("kpt_foreign", "cannot be loaded: SyntaxError"),
    ],
)
def test_an_entry_point_that_gives_no_candidate_is_told_with_its_package_and_stops_nobody(
    install: Callable[[str, str, str], None], value: str, told: str
) -> None:
    before = names()
    source = SOURCE.format(name="foreign", turn=99)
    source += {"ZeroDivisionError": "1 / 0\n", "SyntaxError": "1 +\n"}.get(told.rpartition(" ")[2], "")
    install("kpt_foreign", source, value)
    install("kpt_good", SOURCE.format(name="good", turn=99), "kpt_good:CANDIDATE")
    with pytest.warns(UserWarning, match=rf"entry point 'kpt_foreign_point' of kpt_foreign {told}.* left out"):
        assert names() == [*before, "good"]


def test_two_of_one_name_are_refused(install: Callable[[str, str, str], None]) -> None:
    install("kpt_foreign", SOURCE.format(name="float8", turn=99), "kpt_foreign:CANDIDATE")
    with pytest.raises(ConfigError, match=r"'float8': two candidates have this name. Uninstall or rename one"):
        registry.candidates()


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'gone': is not known here. Make a new plan; known are .*float8"):
        registry.candidate("gone")


class Needs:
    """A candidate that needs something of each kind."""

    name = "needs"
    level = Level.BALANCED
    stage = Stage.MODULES
    turn = 1
    numerics = Numerics.SAME
    features = ("bf16", "compile")
    packages = (OptionalPackage("json", "json", None, "nothing"),)


def supports(missing: str | None) -> Callable[[str], Decision]:
    return lambda name: Rejected(name, f"no {name} here") if name == missing else Accepted(name, "there")


ALL = tuple(Level)


@pytest.mark.parametrize(
    ("levels", "missing", "packages", "reason"),
    [
        (ALL, None, Needs.packages, None),
        (ALL[:1], None, Needs.packages, "needs level 'balanced'"),
        (ALL, "compile", Needs.packages, "no compile here"),
        (ALL, None, (OptionalPackage("kpt_gone", "kpt-gone", None, "for a test"),), "pip install --no-deps kpt-gone"),
    ],
)
def test_level_hardware_and_packages_admit_it(
    monkeypatch: pytest.MonkeyPatch,
    levels: tuple[Level, ...],
    missing: str | None,
    packages: tuple[OptionalPackage, ...],
    reason: str | None,
) -> None:
    monkeypatch.setattr(Needs, "packages", packages)
    verdict = registry.admitted(Needs(), levels, supports(missing))  # type: ignore[arg-type]
    assert bool(verdict) is (reason is None)
    assert reason is None or reason in verdict.reason
    assert json.dumps(verdict.reason)
