"""Rounding noise is of the size of rounding: correct programs lie within it, planted faults do not."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.reading import Distance, distance, judge, read
from kpt_lightning.validation.rounding import rounding_noise

DTYPES = [torch.float32, torch.bfloat16]


class Norm(nn.Module):
    """RMS norm step by step."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            Norm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.act(self.up(self.norm(x))))
        return out


class Net(nn.Module):
    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(Block(width) for _ in range(depth))), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x))
        return out


def passes(model: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
    def forward() -> tuple[Tensor, dict[str, Tensor]]:
        out = model(x)
        return F.cross_entropy(out.float(), torch.arange(len(x)) % 10), {"out": out}

    return forward


def made(dtype: torch.dtype, scale: float = 1.0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().to(dtype), (scale * torch.randn(32, 64)).to(dtype)


def noise_of(model: nn.Module, x: Tensor, dtype: torch.dtype, seed: int = 0) -> Distance:
    plain = read(model, passes(model, x))
    with rounding_noise(model, dtype, seed=seed):
        return distance(plain, read(model, passes(model, x)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_of_the_size_of_roundoff_forward_and_backward(dtype: torch.dtype) -> None:
    model, x = made(dtype)
    found = noise_of(model, x, dtype)
    # Uniform within half a unit, a chain of about ten: 6.02 dB a bit, and a few bits less.
    one = -20 * math.log10(torch.finfo(dtype).eps)
    assert one - 12 < found.outputs["out"] < one + 12
    for name, value in found.gradients.items():
        assert one - 18 < value < one + 12, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_shaken_where_the_forward_pass_is_linear(dtype: torch.dtype) -> None:
    # What flows into the first layer does not depend on activations here.
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).to(dtype)
    x = torch.randn(4, 8).to(dtype)
    grads = []
    for seed in range(2):
        with rounding_noise(model, dtype, seed=seed):
            model.zero_grad()
            model(x).sum().backward()
        grads.append(model[0].weight.grad)
    moved = (grads[0] - grads[1]).float().norm() / grads[0].float().norm()
    assert 0 < moved < 4 * torch.finfo(dtype).eps


def test_autocast_sets_the_size_of_the_noise() -> None:
    model, x = made(torch.float32)
    fine, coarse = (noise_of(model, x, dtype).outputs["out"] for dtype in DTYPES)
    assert fine - coarse > 80


def test_seeds_give_other_noise_and_one_seed_the_same() -> None:
    model, x = made(torch.float32)
    same = [noise_of(model, x, torch.float32, seed=3) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != noise_of(model, x, torch.float32, seed=4)


def test_the_models_own_draws_are_the_same_with_noise() -> None:
    # Else the spread of a model that is random in eval mode would be that of its seed.
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) + torch.randn(x.shape))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    found = noise_of(Noisy(), torch.randn(32, 64), torch.float32)
    assert found.outputs["out"] > 120
    assert found.worst[1] > 110


@pytest.mark.parametrize("how", [None, ValueError, KeyboardInterrupt])
def test_hooks_are_gone_afterwards(how: type[BaseException] | None) -> None:
    model, x = made(torch.float32)
    before = model(x)
    try:
        with rounding_noise(model, torch.float32):
            assert not torch.equal(model(x), before)
            if how is not None:
                raise how
    except (ValueError, KeyboardInterrupt):
        pass
    assert torch.equal(model(x), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_that_are_no_floating_point_tensors_pass_through() -> None:
    class Leaf(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"tokens": torch.arange(3), "text": "a", "none": None, "pair": (x, 1)}

    with rounding_noise(leaf := Leaf(), torch.float32):
        out = leaf(torch.ones(1000))
    assert out["tokens"].tolist() == [0, 1, 2]
    assert (out["text"], out["none"], out["pair"][1]) == ("a", None, 1)
    assert not torch.equal(out["pair"][0], torch.ones(1000))


@pytest.mark.parametrize("whole", [True, False])
def test_noise_reaches_into_what_the_user_compiled_and_its_code_is_kept(whole: bool) -> None:
    torch._dynamo.reset()
    model, x = made(torch.float32)
    counter = CompileCounter()
    if whole:
        run: nn.Module = torch.compile(model, backend=counter)  # type: ignore[assignment]
    else:
        run = model
        model.blocks.compile(backend=counter)  # type: ignore[operator]
    before, frames = run(x), counter.frame_count
    assert frames
    with rounding_noise(run, torch.float32):
        moved = (run(x) - before).norm() / before.norm()
    assert 1e-8 < moved < 1e-5
    assert torch.equal(run(x), before)
    assert counter.frame_count == frames


def in_double(model: nn.Module) -> nn.Module:
    """The same numbers, each layer computed in double precision."""

    def exactly(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            bias = layer.bias.double()  # type: ignore[operator,union-attr]
            return F.linear(x.double(), layer.weight.double(), bias).to(x.dtype)  # type: ignore[operator,union-attr]

        return forward

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = exactly(layer)  # type: ignore[method-assign]
    return model


def in_parts(model: nn.Module) -> nn.Module:
    """Sums in another order."""

    def halves(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            (a, b), (v, w) = x.chunk(2, -1), layer.weight.chunk(2, -1)  # type: ignore[operator,union-attr]
            return F.linear(a, v) + (F.linear(b, w) + layer.bias)  # type: ignore[operator]

        return forward

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = halves(layer)  # type: ignore[method-assign]
    return model


def other_norm(model: nn.Module) -> nn.Module:
    """One kernel instead of five."""
    for norm in model.modules():
        if isinstance(norm, Norm):
            norm.forward = lambda x, norm=norm: F.rms_norm(x, (64,), norm.weight, norm.eps)  # type: ignore
    return model


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    model.compile()
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [in_double, in_parts, other_norm, compiled])
def test_a_correct_program_lies_within_four_spreads(
    change: Callable[[nn.Module], nn.Module], dtype: torch.dtype
) -> None:
    model, x = made(dtype)
    plain, noise = read(model, passes(model, x)), noise_of(model, x, dtype)
    changed = change(copy.deepcopy(model))
    found = distance(plain, read(changed, passes(changed, x)))
    verdict = judge(found, gate(Numerics.ROUNDING, dtype), noise)
    assert verdict, verdict.reason


def wrong_epsilon(model: nn.Module) -> None:
    for norm in model.modules():
        if isinstance(norm, Norm):
            norm.eps = 1e-6


def dropped_bias(model: nn.Module) -> None:
    layer = model.blocks[1].up  # type: ignore[union-attr,index]
    layer.forward = lambda x: F.linear(x, layer.weight) + 0 * layer.bias  # type: ignore[assignment,operator]


def transposed_weight(model: nn.Module) -> None:
    layer = model.blocks[1].down  # type: ignore[union-attr,index]
    layer.forward = lambda x: F.linear(x, layer.weight.t(), layer.bias)  # type: ignore[assignment,operator]


def wrong_backward(model: nn.Module) -> None:
    # Right forward; a tenth of the gradient is missing backward.
    model.blocks[2].up.register_full_backward_hook(lambda _module, into, _out: (0.9 * into[0],))  # type: ignore[union-attr,index]


def lower_precision(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            fewer = torch.float8_e4m3fn if layer.weight.dtype is torch.bfloat16 else torch.bfloat16
            with torch.no_grad():
                layer.weight.copy_(layer.weight.to(fewer))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fault", "scale"),
    [
        # Where activations are as small as the square root of epsilon, epsilon shows.
        (wrong_epsilon, 1e-3),
        (dropped_bias, 1.0),
        (transposed_weight, 1.0),
        (wrong_backward, 1.0),
        (lower_precision, 1.0),
    ],
)
def test_a_planted_fault_lies_outside(fault: Callable[[nn.Module], None], scale: float, dtype: torch.dtype) -> None:
    model, x = made(dtype, scale)
    plain, noise = read(model, passes(model, x)), noise_of(model, x, dtype)
    changed = copy.deepcopy(model)
    fault(changed)
    verdict = judge(distance(plain, read(changed, passes(changed, x))), gate(Numerics.ROUNDING, dtype), noise)
    assert not verdict, verdict.reason
