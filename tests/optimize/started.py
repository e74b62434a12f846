"""Small models and engines; for the tests of the engine."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kpt_lightning.config import KptConfig
from kpt_lightning.optimize.engine import Engine

EMULATED = {"emulate": True, "only_where_it_pays": False}


def engine(**settings: Any) -> Engine:
    return Engine(KptConfig.build({"precision": "fp8", "float8": EMULATED} | settings))


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **sizes))


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def state(model: nn.Module) -> list[Any]:
    """Everything that the engine may touch."""
    return [
        [
            (name, type(module), sorted(vars(module)), module._compiled_call_impl)
            for name, module in model.named_modules()
        ],
        [(name, id(each), each.dtype, each.requires_grad) for name, each in model.named_parameters()],
    ]


def training_step(started: Engine, model: Any, data: Any = None) -> Tensor:
    with started.autocast():
        loss: Tensor = model(**(data or batch())).loss
    loss.backward()
    return loss.detach()


class Blocks(nn.Module):
    """Two small blocks: quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
