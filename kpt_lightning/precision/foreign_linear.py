"""A linear layer in FP8 whose products another library computes, on the Parameters of the layer that is there."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.func import functional_call

from kpt_lightning.precision.float8_linear import Float8Linear, Float8Settings


class Foreign:
    """Holds another library's layer out of sight of ``nn.Module``: names, state-dict keys and children stay.

    Attributes:
        layer: Shares its Parameter objects with the layer in whose place it computes.
    """

    def __init__(self, layer: nn.Module) -> None:
        """Keep it."""
        self.layer = layer


class ForeignLinear(Float8Linear):
    """``nn.Linear`` in FP8 by another library. Made by ``convert_to_float8``, never constructed."""

    foreign: Foreign

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype that the library gives."""
        out: Tensor = self.foreign.layer(input)
        return out

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same with another weight."""
        out: Tensor = functional_call(self.foreign.layer, {"weight": weight}, (x,))
        return out


def make_foreign(layer: nn.Linear, settings: Float8Settings, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Turn a plain ``nn.Linear`` into a :class:`ForeignLinear`, in place.

    Args:
        layer: Changed.
        settings: Of its recipe.
        make: Gives the library's layer, which must hold the same Parameter objects.

    Raises:
        TypeError: It holds others, whose training would be lost.
    """
    made = make(layer)
    if made.weight is not layer.weight or made.bias is not layer.bias:
        raise TypeError(f"{type(made).__name__} does not share the Parameters of the layer that it stands for")
    layer.__class__ = ForeignLinear
    layer.float8, layer.foreign = settings, Foreign(made)  # type: ignore[assignment]
