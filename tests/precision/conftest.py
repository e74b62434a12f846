"""Layers that run in FP8, made as a user's are: by conversion."""

from collections.abc import Callable

import pytest
from torch import nn

from kpt_lightning.config import Float8Config
from kpt_lightning.precision.convert import convert_to_float8


@pytest.fixture
def float8() -> Callable[..., nn.Linear]:
    """Puts one ``nn.Linear`` in FP8 and returns the same object."""

    def convert(layer: nn.Linear, recipe: str = "tensorwise", emulate: bool = True) -> nn.Linear:
        config = Float8Config.model_validate({"recipe": recipe, "emulate": emulate})
        return convert_to_float8(nn.ModuleList([layer]), ["0"], config)[0]

    return convert
