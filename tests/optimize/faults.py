"""Candidates that are wrong in one way each, and honest ones to compare with, for the tests of the search."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig, Level
from kpt_lightning.decision import Rejected
from kpt_lightning.hardware import detect
from kpt_lightning.optimize.rules import on_device
from kpt_lightning.validation.gates import Numerics


class Block(nn.Module):
    """Attention and a gated MLP, each with a part that a fault can hit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return x + F.silu(self.up(x))


class Tiny(nn.Module):
    """Two blocks and a loss; ``nap`` is the time that a candidate can save."""

    def __init__(self, width: int = 32, nap: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.nap = nap

    def forward(self, x: Tensor) -> Tensor:
        if self.nap:
            time.sleep(self.nap)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, 8, 32, generator=torch.Generator().manual_seed(1))


def subject(model: nn.Module, data: Any = None, **settings: Any) -> Subject:
    return Subject(
        model=model,
        profile=on_device(detect(), "cpu"),
        config=KptConfig.build(settings),
        device=torch.device("cpu"),
        owns_precision=True,
        batch=data,
    )


class Made:
    """A candidate made of two functions."""

    level = Level.CONSERVATIVE
    stage = Stage.MODULES
    turn = 50
    features: tuple[str, ...] = ()
    packages: tuple[Any, ...] = ()

    def __init__(
        self,
        name: str,
        change: Callable[[nn.Module], Callable[[], None]],
        numerics: Numerics = Numerics.ROUNDING,
        saves_bytes: int | None = None,
    ) -> None:
        self.name, self._change, self.numerics, self._saves = name, change, numerics, saves_bytes

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        return [Change(candidate=self.name, reason="made for a test", saves_bytes=self._saves)]

    def apply(self, subject: Subject, setting: Any) -> Callable[[], None]:
        return self._change(subject.model)

    def undo(self, subject: Subject, applied: Callable[[], None]) -> None:
        applied()


def set_on(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an instance attribute; the function puts back what was there."""
    known, before = name in vars(owner), vars(owner).get(name)
    vars(owner)[name] = value

    def undo() -> None:
        if known:
            vars(owner)[name] = before
        else:
            del vars(owner)[name]

    return undo


def faster(model: Any, nap: float = 0.0) -> Callable[[], None]:
    """Saves the nap: an honest gain that no noise hides."""
    return set_on(model, "nap", nap)


def with_nap(fault: Callable[[nn.Module], Callable[[], None]]) -> Callable[[nn.Module], Callable[[], None]]:
    """A fault that also is much faster, so that only its numbers can turn it down."""

    def change(model: nn.Module) -> Callable[[], None]:
        undo, awake = fault(model), faster(model)

        def both() -> None:
            awake()
            undo()

        return both

    return change


def wrong_epsilon(model: Any) -> Callable[[], None]:
    return set_on(model.layers[0].norm, "eps", 1e-2)


def dropped_bias(model: Any) -> Callable[[], None]:
    layer = model.layers[0].up
    return set_on(layer, "forward", lambda x: F.linear(x, layer.weight))


def transposed_weight(model: Any) -> Callable[[], None]:
    layer = model.layers[1].up
    return set_on(layer, "forward", lambda x: F.linear(x, layer.weight.t(), layer.bias))


def not_causal(model: Any) -> Callable[[], None]:
    return set_on(model.layers[0], "attend", F.scaled_dot_product_attention)


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * torch.sigmoid(x)


def wrong_backward(model: Any) -> Callable[[], None]:
    layer = model.layers[1]

    def forward(x: Tensor) -> Tensor:
        b, n, w = x.shape
        q, k, v = layer.qkv(layer.norm(x)).view(b, n, 3, 2, w // 2).permute(2, 0, 3, 1, 4)
        x = x + layer.out(layer.attend(q, k, v).transpose(1, 2).reshape(b, n, w))
        return x + _WrongBackward.apply(layer.up(x))

    return set_on(layer, "forward", forward)


def lost_gradient(model: Any) -> Callable[[], None]:
    layer = model.layers[0].up
    return set_on(layer, "forward", lambda x: F.linear(x, layer.weight.detach(), layer.bias))


def scale_off_by_two(model: Any) -> Callable[[], None]:
    layer = model.layers[0].out
    return set_on(layer, "forward", lambda x: 2 * F.linear(x, layer.weight) + layer.bias)


def stale_graph(model: Any) -> Callable[[], None]:
    """Code compiled for other weights, as a cache with too small a key would give."""
    layer = model.layers[0].up
    weight, bias = layer.weight.detach() * 1.01, layer.bias.detach()
    compiled = torch.compile(lambda x: F.linear(x, weight, bias), backend="eager")
    return set_on(layer, "forward", compiled)


def right_eager_wrong_compiled(model: Any) -> Callable[[], None]:
    """As Liger's patch under model.compile(): the loss of the first compiled step is wrong."""
    layer = model.layers[0].up

    def forward(x: Tensor) -> Tensor:
        out = F.linear(x, layer.weight, layer.bias)
        return out * 1.1 if torch.compiler.is_compiling() else out

    return set_on(layer, "forward", torch.compile(forward, backend="eager"))


def nan_inside(model: Any) -> Callable[[], None]:
    layer = model.layers[0].up
    return set_on(layer, "forward", lambda x: F.linear(x, layer.weight, layer.bias) * float("nan"))


FAULTS = {
    each.__name__: each
    for each in (
        wrong_epsilon, dropped_bias, transposed_weight, not_causal, wrong_backward, lost_gradient, scale_off_by_two,
        stale_graph, right_eager_wrong_compiled, nan_inside,
    )
}  # fmt: skip
