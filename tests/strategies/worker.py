"""One process of a real 2-process run; Lightning starts the second one. Started by test_two_processes.py.

Prints one JSON line from rank 0. Not a test module.
"""

import argparse
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from kpt_lightning import KptStrategy

SAMPLES, GLOBAL_BATCH = 32, 4
FLOAT8 = {"emulate": True, "only_where_it_pays": False}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(LightningModule):
    """Owns a parameter itself, beside its blocks: training_step is not forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.scale = nn.Parameter(torch.ones(32))
        self.norms: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.scale

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("held_out", nn.functional.mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0]).float().cpu()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Not Adam: it blows up the rounding of gradients that are nearly zero.
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val, **kwargs)
        self.norms.append(
            float(full(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])))
        )


class CountReductions(Callback):
    """Gradient collectives of one optimizer step, seen by the profiler."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.names = first, last, []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == self.first:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == self.last:
            self.profiler.__exit__(None, None, None)
            names = [event.name for event in self.profiler.events()]
            self.names = [n for n in names if n in ("c10d::allreduce_", "c10d::_reduce_scatter_base_")]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def data(devices: int, rank: int = 0, stride: int = 1) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 32, generator=generator)
    x = x[rank::stride]
    return DataLoader(TensorDataset(x, x.roll(1, dims=1)), batch_size=GLOBAL_BATCH // devices)


def weights(module: nn.Module) -> dict[str, list[float]]:
    return {name: full(parameter.detach()).float().flatten().tolist() for name, parameter in module.named_parameters()}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    strategy = KptStrategy({"float8": FLOAT8} if options.precision == "fp8" else None, precision=options.precision,
                           parallel=options.parallel)  # fmt: skip
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
    return dict(strategy=strategy, accelerator=options.accelerator, devices=options.devices, **quiet)


def train(options: argparse.Namespace) -> dict[str, Any]:
    common = settings(options)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    # Lightning's own sampler would shuffle.
    loader = data(options.devices, rank, options.devices)
    # Ranks start apart: the weights of rank 0 must win.
    torch.manual_seed(rank)
    module = Model()
    counter = CountReductions(options.accumulate * 2, options.accumulate * 3 - 1)
    more = dict(gradient_clip_val=0.5, accumulate_grad_batches=options.accumulate, enable_checkpointing=False)
    trainer = Trainer(max_epochs=2, callbacks=[counter], **more, **common)
    trainer.fit(module, loader)
    plan = trainer.strategy.plan.to_dict()
    path = options.folder / f"{options.parallel}.ckpt"
    trainer.save_checkpoint(path)
    straight = Trainer(max_epochs=4, **more, **common)
    seed_everything(0, verbose=False)
    long_run = Model()
    straight.fit(long_run, loader)
    resumed = Model()
    second = Trainer(max_epochs=4, **more, **common)
    second.fit(resumed, loader, ckpt_path=path)
    held_out = second.validate(resumed, loader, verbose=False)[0]["held_out"]
    predictions = torch.cat(second.predict(resumed, loader)).tolist()
    return {
        "strategy": type(trainer.strategy).__name__, "world_size": trainer.world_size, "plan": plan,
        "reductions": counter.names, "norms": module.norms, "two_epochs": weights(module),
        "four_epochs": weights(long_run), "resumed": weights(resumed), "held_out": held_out,
        "predictions": predictions, "keys": sorted(module.state_dict()),
    }  # fmt: skip


def fabric(options: argparse.Namespace) -> dict[str, Any]:
    strategy = settings(options)["strategy"]
    fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy=strategy)
    fabric.launch()
    torch.manual_seed(fabric.global_rank)
    module = Model()
    if options.parallel == "fsdp2":
        wrapped = fabric.setup_module(module)
        optimizer = fabric.setup_optimizers(module.configure_optimizers())
    else:
        wrapped, optimizer = fabric.setup(module, module.configure_optimizers())
    wrapped.mark_forward_method("training_step")
    loader = fabric.setup_dataloaders(data(options.devices))
    for index, batch in enumerate(loader):
        with fabric.no_backward_sync(wrapped, enabled=index % 2 == 0):
            fabric.backward(wrapped.training_step(batch, index))
        if index % 2:
            fabric.clip_gradients(wrapped, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
    fabric.save(options.folder / "fabric.ckpt", {"model": wrapped})
    return {
        "strategy": type(fabric.strategy).__name__, "world_size": fabric.world_size,
        "plan": fabric.strategy.plan.to_dict(), "two_epochs": weights(module),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--api", choices=("trainer", "fabric"), default="trainer")
    parser.add_argument("--parallel", default="auto")
    parser.add_argument("--precision", default="32")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    result = train(options) if options.api == "trainer" else fabric(options)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(result), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
