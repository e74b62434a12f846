"""FP8 recipes: which tensor of which GEMM is cast to what, and with what scale granularity.

A linear layer runs three GEMMs, all of shape (rows, contraction) x (contraction, columns):

==============  ===================================  ============
role            product                              contraction
==============  ===================================  ============
output          input (M, K) @ weight^T (K, N)       K
grad_input      grad_output (M, N) @ weight (N, K)   N
grad_weight     grad_output^T (N, M) @ input (M, K)  M
==============  ===================================  ============

Names and casts follow torchao.float8 (https://github.com/pytorch/ao/tree/main/torchao/float8).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kpt_lightning.errors import ConfigError

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
Role = Literal["output", "grad_input", "grad_weight"]
ROLES: tuple[Role, ...] = ("output", "grad_input", "grad_weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One named set of casts.

    Attributes:
        name: Name of the recipe.
        rowwise: One scale per row or column of each operand instead of one per tensor.
        grad_dtype: FP8 type of the output gradient.
        weight_rowwise_in_grad_input: False: the weight has one scale in the grad_input GEMM though others are rowwise.
        grad_weight_fp8: False: the weight gradient is a GEMM in the activation dtype.
        power_of_two_scales: Round scales down to powers of two, so that scaling itself is exact.
        min_capability: Least CUDA compute capability whose GEMM library has it.
    """

    name: str
    rowwise: bool
    grad_dtype: torch.dtype
    weight_rowwise_in_grad_input: bool
    grad_weight_fp8: bool
    power_of_two_scales: bool
    min_capability: tuple[int, int]


TENSORWISE = Recipe(
    name="tensorwise",
    rowwise=False,
    grad_dtype=E5M2,
    weight_rowwise_in_grad_input=False,
    grad_weight_fp8=True,
    power_of_two_scales=False,
    min_capability=(8, 9),
)
ROWWISE = Recipe(
    name="rowwise",
    rowwise=True,
    grad_dtype=E4M3,
    weight_rowwise_in_grad_input=True,
    grad_weight_fp8=True,
    power_of_two_scales=True,
    min_capability=(9, 0),
)
ROWWISE_WITH_GW_HP = Recipe(
    name="rowwise_with_gw_hp",
    rowwise=True,
    grad_dtype=E4M3,
    weight_rowwise_in_grad_input=False,
    grad_weight_fp8=False,
    power_of_two_scales=True,
    min_capability=(9, 0),
)
RECIPES = {recipe.name: recipe for recipe in (TENSORWISE, ROWWISE, ROWWISE_WITH_GW_HP)}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in RECIPES:
        raise ConfigError("float8.recipe", name, "is no recipe", f"Choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
