"""KptFSDP2: Lightning's ModelParallelStrategy with fully_shard applied to an unmodified LightningModule."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from kpt_lightning.candidates.compile_blocks import decide_blocks
from kpt_lightning.errors import ConfigError
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.strategies.leaves import TrainerLeaf

# Lightning calls these instead of forward, so they must gather the parameters too.
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class OneMesh:
    """One mesh over all processes, where Lightning's default would be tensor parallel within a node."""

    def setup_environment(self) -> None:
        """Lightning's, with the mesh of data parallelism."""
        strategy: Any = self
        if strategy._data_parallel_size == "auto" and strategy._tensor_parallel_size == "auto":
            strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
            strategy._tensor_parallel_size = 1
        super().setup_environment()  # type: ignore[misc]


class KptFSDP2(TrainerLeaf, OneMesh, ModelParallelStrategy):
    """Several processes, each with a shard of parameters, gradients and optimizer state."""

    strategy_name = "kpt_fsdp2"
    _parallel = "fsdp2"

    def setup(self, trainer: Any) -> None:
        """Convert and compile, then shard, then build optimizers: the only order that works."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self._start_engine(self.model)
        self.model = self.precision_plugin.convert_module(self.model)
        if not is_sharded(self.model):
            shard(self.model, self.device_mesh["data_parallel"], self.root_device, self.plan)
        _materialize_distributed_module(self.model, self.root_device)
        self.model_to_device()
        self.barrier()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
        self._report()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients are reduced once for an optimizer step; Lightning's own context knows DDP only."""
        assert self.model is not None
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        _set_sync(sharded, False)
        try:
            yield
        finally:
            _set_sync(sharded, True)


def is_sharded(module: nn.Module) -> bool:
    """Whether the user, in ``configure_model``, or an earlier setup sharded it already."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def shard(module: nn.Module, mesh: DeviceMesh, device: torch.device, plan: Plan | None) -> None:
    """Apply FSDP2: each repeated block on its own, the rest with the root.

    Args:
        module: Full parameters on every rank; those of rank 0 count.
        mesh: One-dimensional.
        device: Where this rank computes.
        plan: Under a mixed precision bf16 is gathered, fp32 kept in the shards and reduced.

    Raises:
        ConfigError: Manual optimization, and a parameter that no one submodule owns.
    """
    roots = _roots(module)
    _broadcast(module, mesh, device)
    # Autocast on a CPU cannot mix bf16 norm weights with fp32 inputs, on CUDA it does.
    mixed = plan is not None and plan.precision in ("fp8", "bf16-mixed") and device.type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mixed else None,
        reduce_dtype=torch.float32 if mixed else None,
        # Autocast decides what a batch is rounded to: targets of a regression must keep fp32.
        cast_forward_inputs=False,
    )
    blocks = dict(module.named_modules())
    for decision in decide_blocks(module):
        fully_shard(blocks[decision.subject], mesh=mesh, mp_policy=policy)
    for root in roots:
        if not isinstance(root, FSDPModule):
            fully_shard(root, mesh=mesh, mp_policy=policy)
    for name in _STEPS:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def _roots(module: nn.Module) -> list[nn.Module]:
    """What the parameters outside of blocks are sharded with.

    Gradients are reduced through the output of a root's forward. A ``training_step`` that runs backward itself ends
    too late for that, so its submodules are the roots.
    """
    if getattr(module, "automatic_optimization", True):
        return [module]
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    owned = Counter(id(parameter) for child in children for parameter in set(child.parameters()))
    for name, parameter in module.named_parameters():
        if owned[id(parameter)] != 1:
            rule = f"with FSDP2 each parameter must belong to one submodule; {name!r} has {owned[id(parameter)]}"
            next_step = "Move it into one nn.Module whose forward uses it, or use DDP"
            raise ConfigError("automatic_optimization", False, rule, next_step)
    return children


def _broadcast(module: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Every rank starts from the parameters and buffers of rank 0, as under DDP."""
    group = mesh.get_group()
    source = dist.get_global_rank(group, 0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_meta or tensor.numel() == 0:
            continue
        received = tensor.detach().to(device)
        dist.broadcast(received, src=source, group=group)
        tensor.detach().copy_(received)


def _set_sync(modules: list[Any], sync: bool) -> None:
    for module in modules:
        module.set_requires_gradient_sync(sync, recurse=False)
