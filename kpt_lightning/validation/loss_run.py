"""A short training run from the present weights, which are put back bit for bit from a copy on the host."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.validation.state import preserved, seed_all

STEPS = 8
REPEATS = 3
"""Runs of each side, with seeds and batch orders of their own, the same for both sides."""

_NOISE_FLOOR = 0.01
"""Of the fall of the loss: repeats that agree better than that are no reason to reject."""


def room_for_weights(model: nn.Module) -> Decision:
    """Whether the host has room for a copy of the trainable weights."""
    needed = sum(each.numel() * each.element_size() for each in model.parameters() if each.requires_grad)
    free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        return Rejected("loss run", f"a copy of {needed / 1e9:.1f} GB of weights on the host, {free / 1e9:.1f} GB free")
    return Accepted("loss run", f"{needed / 1e9:.1f} GB of weights kept on the host")


def losses_after(
    model: nn.Module, step: Callable[[int], Tensor], *, learning_rate: float, seeds: Sequence[int], steps: int = STEPS
) -> list[float]:
    """Loss after a few steps, once for each seed, each time from the same weights.

    The update is ``-learning_rate * sign(gradient)``, which is Adam's first step (https://arxiv.org/abs/1412.6980,
    section 2.1) and needs no state.

    Args:
        model: Its weights are put back.
        step: Number of the step to the loss, with its graph.
        learning_rate: Change of each weight a step.
        seeds: For all generators and the order of rows.
        steps: How many before the loss is read.
    """
    found = []
    for seed in seeds:
        with preserved_weights(model), preserved(model):
            seed_all(seed)
            for number in range(steps):
                loss = step(number)
                loss.backward()  # type: ignore[no-untyped-call]
                _update(model, learning_rate)
            found.append(float(step(steps).detach()))
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
    spread = max(max(plain) - min(plain), _NOISE_FLOOR * abs(start - mean))
    text = f"loss {new:.4f} after {STEPS} steps, unchanged {mean:.4f} +- {spread:.4f}, from {start:.4f}"
    return Accepted("loss run", text) if new <= mean + spreads * spread else Rejected("loss run", text)


@contextmanager
def preserved_weights(model: nn.Module) -> Iterator[None]:
    """Copy trainable weights to the host and back."""
    kept = [(each, each.detach().to("cpu", copy=True)) for each in model.parameters() if each.requires_grad]
    try:
        yield
    finally:
        with torch.no_grad():
            for each, copy in kept:
                # Past the version counter: what is put back was never changed.
                each.data.copy_(copy)


def _update(model: nn.Module, learning_rate: float) -> None:
    with torch.no_grad():
        for each in model.parameters():
            if each.grad is not None:
                each.data.add_(each.grad.sign(), alpha=-learning_rate)
                each.grad = None
