"""Awkward models under FSDP2, in two processes."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from kpt_lightning.errors import ConfigError
from tests.strategies.awkward import EMULATED, Blocks, Frozen, Late, Manual, Net, Shared, Tied, ZeroSize, batches, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
]


@pytest.fixture
def no_process_group() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("no_process_group")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("model", [Tied, Shared, Frozen, ZeroSize, Late, Blocks, Manual])
def test_awkward_models_train_sharded(model: type[Net]) -> None:
    module = model()
    data = [torch.randint(0, 32, (4, 8))] * 8 if model is Tied else batches(8)
    fit(module, data, config=EMULATED, precision="fp8", parallel="fsdp2")
    assert "Float8Linear" in module.kinds
    assert module.losses[-1] < module.losses[0]


class ManualOwner(Manual):
    """Owns a parameter itself."""

    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.ones(32))


@pytest.mark.usefixtures("no_process_group")
def test_manual_optimization_refuses_to_shard_what_would_get_no_gradient() -> None:
    with pytest.raises(ConfigError, match=r"each parameter must belong to one submodule; 'scale' has 0"):
        fit(ManualOwner(), batches(), config=EMULATED, precision="fp8", parallel="fsdp2")


class Meta(Net):
    """The weights get their data after sharding."""

    def __init__(self) -> None:
        with torch.device("meta"):
            super().__init__()


@pytest.mark.usefixtures("no_process_group")
@pytest.mark.filterwarnings("ignore:DTensor random operators", "ignore:No seed found")
def test_meta_weights_are_made_after_sharding() -> None:
    module = Meta()
    fit(module, batches(8), config=EMULATED, precision="fp8", parallel="fsdp2")
    assert module.losses[-1] < module.losses[0]
