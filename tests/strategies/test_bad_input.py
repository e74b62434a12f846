"""Awkward models, batches and loaders under the strategy: each trains right or gives one clear error."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kpt_lightning import KptStrategy
from kpt_lightning.errors import ConfigError, VerificationError
from kpt_lightning.precision.float8_linear import Float8Linear
from tests.strategies.awkward import (
    EMULATED,
    FP8,
    QUIET,
    Blocks,
    Frozen,
    Late,
    Manual,
    Net,
    Shared,
    Tied,
    ZeroSize,
    batches,
    fit,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
]


def assert_trains_in_fp8(module: Any, data: Any) -> Trainer:
    trainer = fit(module, data)
    assert "Float8Linear" in module.kinds
    assert module.losses[-1] < module.losses[0]
    assert not any(isinstance(m, Float8Linear) for m in module.modules())
    return trainer


def test_tied_embedding_and_integer_inputs_train_and_stay_tied() -> None:
    module = Tied()
    tokens = [torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(0))] * 8
    trainer = assert_trains_in_fp8(module, tokens)
    assert module.readout.weight is module.embed.weight
    assert "tied to 'embed'" in trainer.strategy.plan.explain("readout")[0].reason


def test_a_shared_module_and_a_shared_weight_train() -> None:
    module = Shared()
    assert_trains_in_fp8(module, batches(8))
    assert module.third.weight is module.first.weight


def test_frozen_weights_stay_frozen() -> None:
    module = Frozen()
    before = module.net[0].weight.detach().clone()
    trainer = assert_trains_in_fp8(module, batches(8))
    assert torch.equal(module.net[0].weight, before)
    assert module.net[0].weight.grad is None
    # The first layer is frozen and its input needs no gradient: one GEMM of its three runs.
    assert "output 2, grad_input 0, grad_weight 1" in trainer.strategy.plan.explain("fp8 calls")[0].reason


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_zero_size_parameters_are_left_alone() -> None:
    trainer = assert_trains_in_fp8(ZeroSize(), batches(8))
    assert "empty" in trainer.strategy.plan.explain("empty")[0].reason


def test_meta_parameters_are_refused_by_name() -> None:
    with torch.device("meta"):
        module = Net()
    with pytest.raises(ConfigError, match=r"model='net\.0\.weight': is on the meta device.*configure_model"):
        fit(module, batches())


def test_weights_made_in_configure_model_are_converted() -> None:
    assert_trains_in_fp8(Late(), batches(8))


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: {"x": x}, lambda batch: batch["x"]),
        (lambda x: (x, {"unused": torch.ones(8, dtype=torch.long)}), lambda batch: batch[0]),
        (lambda x: [x, [x, None, "text"]], lambda batch: batch[1][0]),
        (lambda x: {"a": {"b": [x]}, "name": "n"}, lambda batch: batch["a"]["b"][0]),
    ],
    ids=["dict", "tuple", "list", "nested"],
)
@pytest.mark.parametrize("precision", ["fp8", "bf16", "32"])
def test_any_batch_structure_trains(wrap: Any, unwrap: Any, precision: str) -> None:
    class Structured(Net):
        def loss(self, batch: Any) -> Tensor:
            return self.net(unwrap(batch)).float().square().mean()

    module = Structured()
    fit(module, [wrap(x) for x in batches(8)], precision=precision, config=EMULATED if precision == "fp8" else None)
    assert module.losses[-1] < module.losses[0]


def test_manual_optimization_trains_and_is_proved() -> None:
    trainer = assert_trains_in_fp8(Manual(), batches(8))
    assert trainer.strategy.plan.explain("fp8 calls")[0]


class TwoOptimizers(Manual):
    """A generator and a discriminator; the first step runs only one of them."""

    def build(self) -> None:
        super().build()
        self.other = nn.Linear(32, 48)

    def training_step(self, batch: Any, index: int) -> None:
        loss = Net.training_step(self, batch, index)
        first, second = self.optimizers()
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        self.manual_backward(self.other(batch).square().mean())
        second.step()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.05), torch.optim.SGD(self.other.parameters(), 0.05)


def test_two_optimizers_train_and_the_layer_that_had_no_turn_is_named() -> None:
    with pytest.warns(UserWarning, match="0 output GEMMs for 1 FP8 layers of size 32 -> 48"):
        assert_trains_in_fp8(TwoOptimizers(), batches(8))


class OtherFirst(TwoOptimizers):
    """The first optimizer steps train a part that is not in FP8."""

    def build(self) -> None:
        super().build()
        self.small = nn.Linear(32, 5)

    def training_step(self, batch: Any, index: int) -> None:
        if index < 3:
            loss = self.small(batch).square().mean()
            optimizer = self.optimizers()[0]
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return
        loss = Net.training_step(self, batch, index)
        optimizer = self.optimizers()[1]
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.small.parameters(), 0.05), torch.optim.SGD(self.net.parameters(), 0.05)


@pytest.mark.filterwarnings("ignore:kpt. 0 output GEMMs for 1 FP8 layers of size 32 -> 48")
def test_optimizer_steps_of_other_modules_come_first_under_manual_optimization() -> None:
    trainer = assert_trains_in_fp8(OtherFirst(), batches(8))
    assert trainer.strategy.plan.explain("fp8 calls")[0]


class Bypass(Net):
    def loss(self, batch: Any) -> Tensor:
        return F.linear(batch, self.net[0].weight).square().mean()


def test_a_model_that_calls_the_weights_past_forward_is_stopped_in_step_one() -> None:
    module = Bypass()
    with pytest.raises(VerificationError, match="not one FP8 GEMM ran"):
        fit(module, batches())
    assert len(module.losses) == 1
    assert type(module.net[0]) is nn.Linear


class BypassInTraining(Bypass):
    def validation_step(self, batch: Any, index: int) -> None:
        self.net(batch)


def test_a_sanity_validation_that_runs_in_fp8_proves_nothing_about_training() -> None:
    module = BypassInTraining()
    trainer = Trainer(strategy=KptStrategy(**FP8), **QUIET)
    data = DataLoader(batches(), batch_size=None)
    with pytest.raises(VerificationError, match="not one FP8 GEMM ran"):
        trainer.fit(module, data, data)


class Skips(Net):
    def training_step(self, batch: Any, index: int) -> Any:
        return None if index < 2 else super().training_step(batch, index)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_that_return_none_are_not_taken_for_missing_fp8() -> None:
    assert_trains_in_fp8(Skips(), batches(8))


def test_nan_in_a_batch_is_not_hidden_by_fp8() -> None:
    data = batches(3)
    data[1][0, 0] = float("nan")
    module = Net()
    fit(module, data)
    assert module.losses[0] == module.losses[0]
    assert module.losses[1] != module.losses[1]


@pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero")
def test_an_empty_loader_trains_nothing_and_leaves_the_model_as_it_was() -> None:
    module = Net()
    trainer = fit(module, [])
    assert module.losses == []
    assert trainer.global_step == 0
    assert type(module.net[0]) is nn.Linear


def test_blocks_are_compiled_when_asked_for_and_restored_after_an_exception() -> None:
    class Breaks(Blocks):
        def training_step(self, batch: Any, index: int) -> Tensor:
            self.compiled = [layer._compiled_call_impl is not None for layer in self.layers]
            loss = super().training_step(batch, index)
            if index == 2:
                raise RuntimeError("in the middle")
            return loss

    module = Breaks()
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(module, batches(), config={**EMULATED, "compile": {"blocks": True}}, precision="fp8")
    assert module.compiled == [True, True]
    assert [layer._compiled_call_impl for layer in module.layers] == [None, None]
    assert type(module.layers[0][0]) is nn.Linear


def test_blocks_compiled_by_the_user_run_in_fp8_and_stay_compiled() -> None:
    module = Blocks()
    for layer in module.layers:
        layer.compile()
    mine = [layer._compiled_call_impl for layer in module.layers]
    trainer = fit(module, batches(8), config={**EMULATED, "compile": {"blocks": True}}, precision="fp8")
    assert module.losses[-1] < module.losses[0]
    assert [layer._compiled_call_impl for layer in module.layers] == mine
    assert trainer.strategy.plan.explain("fp8 calls")[0]
    assert "compiled by the user" in trainer.strategy.plan.explain("layers.0")[0].reason


@pytest.mark.parametrize("what", ["leaf", "child", "module"])
def test_torch_compile_by_the_user_runs_the_converted_layers(what: str) -> None:
    module: Any = Net()
    if what == "leaf":
        module.net[0] = torch.compile(module.net[0])
    elif what == "child":
        module.net = torch.compile(module.net)
    keys = set(module.state_dict())
    trainer = fit(torch.compile(module) if what == "module" else module, batches(8))
    assert "output 2" in trainer.strategy.plan.explain("fp8 calls")[0].reason
    assert set(module.state_dict()) == keys
