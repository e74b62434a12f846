"""Linear layers in FP8 by torchao (https://github.com/pytorch/ao/tree/main/torchao/float8)."""

from dataclasses import replace

import torch
from torch import nn

from kpt_lightning.optional import TORCHAO
from kpt_lightning.precision.float8_linear import Float8Settings


def torchao_linear(layer: nn.Linear, settings: Float8Settings) -> nn.Module:
    """A layer of torchao's on the Parameters of ``layer``, which is not changed.

    Recipes have torchao's names. Under autocast on a CPU it computes in the dtype of its input, for it asks for CUDA's.

    Args:
        layer: Sizes multiples of 16.
        settings: Recipe, and whether to emulate.

    Raises:
        MissingDependencyError: torchao is not installed.
    """
    TORCHAO.require("float8.backend='torchao'")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    with torch.device("meta"):
        shell = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    shell.weight, shell.bias = layer.weight, layer.bias
    config = replace(Float8LinearConfig.from_recipe_name(settings.recipe.name), emulate=settings.emulate)
    # It exchanges children; the root it would give back as it is.
    changed: nn.Module = convert_to_float8_training(nn.Sequential(shell), config=config)[0]
    return changed
