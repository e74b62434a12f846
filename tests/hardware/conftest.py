"""Stored machines, as the tests of this folder read them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kpt_lightning.hardware import HardwareProfile

PROFILES = Path(__file__).parent / "profiles"


@pytest.fixture
def load() -> Callable[[str], HardwareProfile]:
    """Reads a stored machine by the name of its file."""
    return lambda name: HardwareProfile.load(PROFILES / f"{name}.json")
