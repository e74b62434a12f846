"""One test for each private point of Lightning and torch that this package leans on."""

import inspect
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.connector import _Connector
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import nn

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class _Probe(SingleDeviceStrategy):
    """Notes who calls the hook that KptStrategy binds in, and what is known by then."""

    def _configure_launcher(self) -> None:
        frame = inspect.currentframe()
        assert frame is not None
        self.callers = []
        while frame.f_back is not None and len(self.callers) < 3:
            frame = frame.f_back
            self.callers.append((type(frame.f_locals.get("self")), frame.f_code.co_name, dict(frame.f_locals)))
        self.known = (self.accelerator, self.precision_plugin)


def test_the_trainer_connector_calls_configure_launcher_last_from_its_constructor() -> None:
    probe = _Probe("cpu")
    trainer = Trainer(strategy=probe, precision="bf16-mixed", devices=1, **QUIET)
    (lazy, lazy_name, _), (owner, name, arguments), _ = probe.callers
    assert (lazy, lazy_name, owner, name) == (
        _AcceleratorConnector, "_lazy_init_strategy", _AcceleratorConnector, "__init__",
    )  # fmt: skip
    assert (arguments["precision"], arguments["devices"]) == ("bf16-mixed", 1)
    assert probe.known == (trainer.accelerator, trainer.precision_plugin)


def test_the_fabric_connector_calls_configure_launcher_last_from_its_constructor() -> None:
    from lightning.fabric.strategies import SingleDeviceStrategy as FabricSingle

    class Probe(FabricSingle):
        _configure_launcher = _Probe._configure_launcher
        precision_plugin = None

    probe = Probe("cpu")
    Fabric(strategy=probe, precision="bf16-mixed", devices=1)
    (_, lazy_name, _), (owner, name, arguments), _ = probe.callers
    assert (lazy_name, owner, name) == ("_lazy_init_strategy", _Connector, "__init__")
    assert (arguments["precision"], arguments["devices"]) == ("bf16-mixed", 1)


@pytest.mark.parametrize("connector", [_AcceleratorConnector, _Connector])
def test_connectors_keep_devices_and_plugins_under_these_names(connector: type) -> None:
    source = inspect.getsource(connector)
    flag = "_precision_plugin_flag" if connector is _AcceleratorConnector else "_precision_instance"
    for name in ("_parallel_devices", "_num_nodes_flag", "_devices_flag", flag):
        assert f"self.{name}" in source


def test_the_trainer_reads_its_strategy_from_the_connector() -> None:
    trainer = Trainer(accelerator="cpu", devices=1, **QUIET)
    other = SingleDeviceStrategy("cpu")
    trainer._accelerator_connector.strategy = other
    assert trainer.strategy is other


def test_fabric_takes_strategy_and_precision_after_the_connector_is_done() -> None:
    source = inspect.getsource(Fabric.__init__)
    assert "self._connector.strategy" in source
    assert "self._strategy.precision" in source


def test_a_module_compiled_in_place_is_restored_by_clearing_one_attribute() -> None:
    module = nn.Linear(2, 2)
    assert module._compiled_call_impl is None
    module.compile(backend="eager")
    assert module._compiled_call_impl is not None
    module._compiled_call_impl = None
    assert module(torch.zeros(1, 2)).shape == (1, 2)


def test_transformers_keeps_a_replaced_loss_function_under_this_name() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model = LlamaForCausalLM(config)
    original = model.loss_function
    assert "_loss_function" not in vars(model)
    model.loss_function = len
    assert vars(model).pop("_loss_function") is len
    assert model.loss_function is original


def test_torch_tells_whether_a_profiler_runs() -> None:
    assert not torch._C._autograd._profiler_enabled()
    with torch.profiler.profile():
        assert torch._C._autograd._profiler_enabled()


def test_lightning_tears_the_strategy_down_after_an_exception() -> None:
    class Breaks(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def training_step(self, batch: Any, index: int) -> Any:
            raise RuntimeError("in the middle")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    class Notes(SingleDeviceStrategy):
        down = 0

        def teardown(self) -> None:
            self.down += 1
            super().teardown()

    strategy = Notes("cpu")
    with pytest.raises(RuntimeError, match="in the middle"):
        Trainer(strategy=strategy, max_epochs=1, **QUIET).fit(Breaks(), [torch.zeros(1, 2)])
    assert strategy.down == 1
