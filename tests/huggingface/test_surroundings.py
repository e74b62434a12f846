from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend

from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.huggingface.surroundings import surroundings


def state(
    kind: DistributedType = DistributedType.NO, mixed: str = "no", dynamo: DynamoBackend = DynamoBackend.NO,
    fsdp_version: int = 2,
) -> Any:  # fmt: skip
    """Of machines that are not here; a real one stands in the first test."""
    return SimpleNamespace(
        distributed_type=kind, mixed_precision=mixed, device=torch.device("cpu"), num_processes=1,
        dynamo_plugin=SimpleNamespace(backend=dynamo), fsdp_plugin=SimpleNamespace(fsdp_version=fsdp_version),
    )  # fmt: skip


@pytest.mark.parametrize(("mixed", "precision"), [("no", "32"), ("bf16", "bf16-mixed")])
def test_a_real_accelerator_is_read(mixed: str, precision: str) -> None:
    found = surroundings(Accelerator(mixed_precision=mixed).state, KptConfig())
    assert (found.parallel, found.precision, found.compiles, found.processes) == ("single", precision, False, 1)
    assert found.device.type == "cpu"


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        (DistributedType.NO, "single"),
        (DistributedType.MULTI_GPU, "ddp"),
        (DistributedType.MULTI_CPU, "ddp"),
        (DistributedType.FSDP, "fsdp2"),
    ],
)
def test_ways_of_parallel_training_have_our_names(kind: DistributedType, parallel: str) -> None:
    assert surroundings(state(kind), KptConfig()).parallel == parallel


@pytest.mark.parametrize(
    ("given", "settings", "field"),
    [
        ({"mixed": "fp8"}, {}, "mixed_precision"),
        ({"kind": DistributedType.DEEPSPEED}, {}, "distributed_type"),
        ({"kind": DistributedType.MEGATRON_LM}, {}, "distributed_type"),
        ({"kind": DistributedType.FSDP, "fsdp_version": 1}, {}, "fsdp_version"),
        ({"kind": DistributedType.MULTI_GPU}, {"parallel": "fsdp2"}, "parallel"),
        ({"mixed": "bf16"}, {"precision": "32"}, "precision"),
        ({"mixed": "fp16"}, {"precision": "fp8"}, "precision"),
        ({"mixed": "fp16"}, {"precision": "bf16-mixed"}, "precision"),
        ({"dynamo": DynamoBackend.INDUCTOR}, {"precision": "fp8"}, "precision"),
        ({"dynamo": DynamoBackend.INDUCTOR}, {"compile": {"blocks": True}}, "compile.blocks"),
        ({"dynamo": DynamoBackend.INDUCTOR}, {"compile": {"loss": True}}, "compile.loss"),
    ],
)
def test_contradictions_are_refused_by_name(given: dict[str, Any], settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        surroundings(state(**given), KptConfig.build(settings))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"mixed": "bf16"}, {"precision": "fp8"}),
        ({"mixed": "bf16"}, {"precision": "bf16"}),
        ({"mixed": "fp16"}, {}),
        ({"mixed": "bf16", "dynamo": DynamoBackend.INDUCTOR}, {"precision": "fp8"}),
        ({"kind": DistributedType.MULTI_GPU}, {"parallel": "ddp"}),
    ],
)
def test_what_goes_together_passes(given: dict[str, Any], settings: dict[str, Any]) -> None:
    surroundings(state(**given), KptConfig.build(settings))
