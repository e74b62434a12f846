"""Optimizations tried on a model in a plain loop, seconds on a CPU. Run: python examples/auto_optimize.py.

A second run takes its plan from .kpt/plans and tries nothing.
"""

import argparse

import torch
from rich.console import Console
from torch import Tensor, nn

import kpt_lightning


class Block(nn.Module):
    """A residual block whose activation is written out, as research code has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Any (..., width) to the same shape."""
        hidden = self.up(self.norm(x))
        return x + self.down(0.5 * hidden * (1 + torch.tanh(0.79788 * (hidden + 0.044715 * hidden**3))))


class Classifier(nn.Module):
    """Four blocks: inputs (batch, 64) to logits (batch, 8)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="no trial starts later than that")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = torch.randn(512, 64), torch.randint(8, (512,))
    loss_fn = nn.functional.cross_entropy
    before = {name: value.clone() for name, value in model.state_dict().items()}

    model = kpt_lightning.auto_optimize(
        model, batch, loss_fn=loss_fn, optimizer=optimizer, level="conservative", max_seconds=options.max_seconds
    )
    plan = kpt_lightning.plan_of(model)
    assert plan is not None
    Console().print(plan.render())
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    print(f"Weights after the trials are bit for bit those before: {same}")

    for step in range(options.steps):
        loss = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, options.steps - 1):
            print(f"Loss at step {step + 1}: {loss.item():.4f}")
    print(f"Trained with: {plan.summary()}")
    kpt_lightning.restore(model)


if __name__ == "__main__":
    main()
