import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kpt_lightning.errors import MissingDependencyError
from kpt_lightning.versions import NEEDED, check_versions


def test_the_installed_versions_pass() -> None:
    check_versions()


@pytest.mark.parametrize(
    ("name", "version"), [("lightning", "2.5.5"), ("lightning", "2.7.0"), ("torch", "2.8.0"), ("torch", "2.8.1+cu128")]
)
def test_a_version_that_was_not_tried_is_refused_with_the_pip_line(name: str, version: str) -> None:
    installed = {"lightning": "2.6.6", "torch": "2.13.0+cpu", name: version}
    with pytest.raises(MissingDependencyError, match=f"{name} {version.replace('+', '.')}.*pip install '{name}"):
        check_versions(installed)


def test_they_are_those_of_the_build_file() -> None:
    build = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    stated = {Requirement(line).name: Requirement(line).specifier for line in build["project"]["dependencies"]}
    for name, wanted in NEEDED.items():
        assert stated[name] == SpecifierSet(wanted)
