"""What users of the history import from one place."""

import subprocess
import sys

import pytest

from kpt_lightning import tracking


def test_a_history_is_searched_and_new_runs_are_judged_by_public_names() -> None:
    before, after = [0.100, 0.101, 0.099, 0.100, 0.101, 0.100], [0.120, 0.121, 0.119, 0.120, 0.121, 0.120]
    (change,) = tracking.detect_changes(before + after)
    assert change.index == len(before)
    assert tracking.compare(before, after[:1]).outcome == "regression"


@pytest.mark.parametrize("name", tracking.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(tracking, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'detect_chances'"):
        tracking.detect_chances  # noqa: B018


def test_importing_the_package_loads_neither_numpy_nor_sqlalchemy() -> None:
    code = "import sys, kpt_lightning.tracking; print({'numpy', 'sqlalchemy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
