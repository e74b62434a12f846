"""A short training run from the present weights, which are put back bit for bit from a copy."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import KptError
from kpt_lightning.validation.state import preserved, seed_all

STEPS = 8
SEEDS = (0, 1, 2)
"""Runs of each side, with random numbers and batch orders of their own, the same for both sides."""

_UPDATE, _SPECTRAL_UPDATE = 0.02, 0.1
"""Each step moves a weight tensor by at most the first share of its norm, and by the second over the square root of its
shorter side. A gradient may have rank one while the spectral norm of a fresh weight is about 2 / sqrt(side) of its
Frobenius norm, so that this is 5 % of the former (https://arxiv.org/abs/2310.17813). In 8 steps the loss falls far
beyond its noise, and a model that trains does not diverge: on one H200 a Llama of 1.2 B parameters did at 2 %, in bf16
as in FP8, and falls as far at 0.25 %."""

_LEAST, _MOST = 0.1, 0.25
"""Shares of the fall of the loss. So few steps on so few rows fit noise as much as data, and rounding slows that down:
at 0.25 and 0.5 % the mean of three seeds in FP8 is up to 8 % of the fall behind there (benchmarks/results/loss_run_*),
and level with bf16 after 300 steps on real text. However far the repeats are apart, a quarter of the fall is no
rounding."""


class OutOfTimeError(KptError):
    """The deadline came before there was something to judge."""


def room_for_weights(weights: Iterable[Tensor]) -> Decision:
    """Whether device or host have room for a copy of the trainable weights."""
    kept = list(weights)
    needed = _bytes(kept)
    free = max(psutil.virtual_memory().available, _free_on_device(kept))
    if needed > 0.8 * free:
        return Rejected("loss run", f"a copy of {needed / 1e9:.1f} GB of weights has no room, {free / 1e9:.1f} GB free")
    return Accepted("loss run", f"{needed / 1e9:.1f} GB of weights kept")


def losses_after(
    model: nn.Module, step: Callable[[int, int], Tensor], *, seeds: Sequence[int] = SEEDS, steps: int = STEPS,
    deadline: float = math.inf, optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:  # fmt: skip
    """Loss after a few steps, once for each seed, each time from the same weights.

    Without an optimizer the update of each tensor is its gradient at a share of the tensor's norm, which needs no state
    and no learning rate (layer-wise scaling: https://arxiv.org/abs/1708.03888).

    Args:
        model: Its weights are put back.
        step: (seed, number of the step) to a loss with its graph; number ``steps`` is the last and only read.
        seeds: Runs.
        steps: How many before the loss is read.
        deadline: Value of ``time.monotonic()`` after which no step begins.
        optimizer: Makes the steps where it is part of what is judged; its state is lost, and its weights put back.

    Raises:
        OutOfTimeError: The deadline came first.
    """
    found = []
    groups = [] if optimizer is None else optimizer.param_groups
    weights = [*model.parameters(), *(each for group in groups for each in group["params"])]
    with preserved_weights(weights) as put_back, preserved(model, weights=False):
        for seed in seeds:
            put_back()
            if optimizer is not None:
                optimizer.state.clear()
            seed_all(seed)
            for number in range(steps):
                if time.monotonic() > deadline:
                    raise OutOfTimeError("no time left to compare losses; raise max_seconds")
                step(seed, number).backward()  # type: ignore[no-untyped-call]
                if optimizer is None:
                    _update(model)
                else:
                    optimizer.step()
                    for each in weights:
                        each.grad = None
            found.append(float(step(seed, steps).detach()))
    return found


def judge_losses(plain: Sequence[float], changed: Sequence[float], start: float, spreads: float) -> Decision:
    """Whether a changed model trains as the unchanged one does.

    Args:
        plain: Losses of the unchanged model, one for each seed.
        changed: Of the changed one, same seeds.
        start: Loss before the first step.
        spreads: How many spreads of ``plain`` the mean of ``changed`` may be above the mean of ``plain``.
    """
    mean, new = sum(plain) / len(plain), sum(changed) / len(changed)
    fall = abs(start - mean)
    allowed = min(max(spreads * (max(plain) - min(plain)), _LEAST * fall), _MOST * fall)
    text = f"loss {new:.4f} after {STEPS} steps, unchanged {mean:.4f} and {allowed:.4f} allowed, from {start:.4f}"
    return Accepted("loss run", text) if new <= mean + allowed else Rejected("loss run", text)


@contextmanager
def preserved_weights(weights: Iterable[Tensor]) -> Iterator[Callable[[], None]]:
    """Copy trainable weights, on the device where there is plenty of room, else to the host; put them back at the end.

    Yields:
        Puts them back at once.
    """
    own = list({id(each): each for each in weights}.values())
    on_device = _bytes(own) < 0.5 * _free_on_device(own)
    kept = [
        (each, each.detach().clone() if on_device else each.detach().to("cpu", copy=True))
        for each in own
        if each.requires_grad
    ]

    def put_back() -> None:
        for each, copy in kept:
            # Past the version counter: what is put back was never changed.
            each.data.copy_(copy)

    try:
        yield put_back
    finally:
        put_back()


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in weights if each.requires_grad)


def _free_on_device(weights: Iterable[Tensor]) -> int:
    """Bytes that the weights' CUDA device has free, what torch's allocator holds unused included; 0 elsewhere."""
    device = next((each.device for each in weights), torch.device("cpu"))
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _update(model: nn.Module) -> None:
    with torch.no_grad():
        for each in model.parameters():
            if each.grad is not None:
                size, slope = _norm(each), _norm(each.grad)
                # A tensor of zeros, such as a fresh bias, moves as one of unit norm would.
                share = _share(each) * torch.where(size > 0, size, 1.0) / torch.where(slope > 0, slope, 1.0)
                # In fp16 the share may overflow and the product vanish.
                wide = torch.promote_types(each.dtype, torch.float32)
                each.data.sub_((each.grad.to(wide) * share).to(each.dtype))
                each.grad = None


def _share(weight: Tensor) -> float:
    rows = weight.shape[0] if weight.dim() else 1
    side = min(rows, weight.numel() // max(rows, 1)) if weight.dim() > 1 else rows
    return min(_UPDATE, _SPECTRAL_UPDATE / math.sqrt(max(side, 1)))


def _norm(tensor: Tensor) -> Tensor:
    plain = tensor.detach()
    plain = plain if plain.layout is torch.strided else plain.coalesce().values()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    found: Tensor = torch.linalg.vector_norm(plain, dtype=torch.promote_types(plain.dtype, torch.float32))
    return found
