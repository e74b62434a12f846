"""KptStrategy in one process: binding, what wins, what is refused, and that all is undone afterwards."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kpt_lightning import KptDDP, KptFSDP2, KptPrecision, KptSingleDevice, KptStrategy
from kpt_lightning.errors import ConfigError, KptError, UnsupportedHardwareError

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "max_epochs": 1,
}  # fmt: skip
EMULATED = {"float8": {"emulate": True, "only_where_it_pays": False}}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*has `shuffle=True`"),
]


class Net(LightningModule):
    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.fail_at = fail_at
        self.seen: list[type] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.seen.append(type(self.net[0]))
        if index == self.fail_at:
            raise RuntimeError("in the middle of fit")
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.seen.append(type(self.net[0]))
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader() -> DataLoader[Any]:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, -x), batch_size=4)


@pytest.mark.parametrize(
    ("arguments", "leaf"),
    [
        ({}, KptSingleDevice),
        ({"devices": 1}, KptSingleDevice),
        ({"devices": "auto"}, KptSingleDevice),
        ({"devices": 2}, KptDDP),
        ({"devices": 1, "num_nodes": 2}, KptDDP),
    ],
)
def test_it_becomes_the_leaf_that_devices_and_nodes_ask_for(arguments: dict[str, Any], leaf: type) -> None:
    trainer = Trainer(strategy=KptStrategy(), **arguments, **QUIET)
    assert type(trainer.strategy) is leaf
    assert isinstance(trainer.strategy, KptStrategy)
    assert trainer.world_size == {KptSingleDevice: 1, KptDDP: 2}[leaf]


def test_accelerator_auto_finds_a_device() -> None:
    trainer = Trainer(strategy=KptStrategy(parallel="single"), **{**QUIET, "accelerator": "auto"}, devices=1)
    assert trainer.strategy.root_device.type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(("parallel", "leaf"), [("single", KptSingleDevice), ("ddp", KptDDP), ("fsdp2", KptFSDP2)])
def test_what_is_asked_for_wins_over_the_device_count(parallel: Any, leaf: type) -> None:
    assert type(Trainer(strategy=KptStrategy(parallel=parallel), devices=1, **QUIET).strategy) is leaf


def test_xla_is_refused_with_what_there_is() -> None:
    with pytest.raises(UnsupportedHardwareError, match=r"parallel='xla'.*single, ddp, fsdp2"):
        Trainer(strategy=KptStrategy(parallel="xla"), **QUIET)


def test_the_users_object_stays_unbound_and_serves_a_second_trainer() -> None:
    strategy = KptStrategy(EMULATED, precision="fp8")
    first = Trainer(strategy=strategy, **QUIET)
    second = Trainer(strategy=strategy, **QUIET)
    assert first.strategy is not second.strategy
    assert strategy._accelerator is None
    assert strategy.parallel_devices is None
    with pytest.raises(KptError, match="no device yet"):
        _ = strategy.root_device
    for trainer in (first, second):
        trainer.fit(Net(), loader())
        assert trainer.strategy.plan.precision == "fp8"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("bound", [False, True])
def test_it_is_copied_and_pickled(clone: Any, bound: bool) -> None:
    strategy: Any = KptStrategy(EMULATED, precision="fp8", find_unused_parameters=True, parallel="ddp")
    if bound:
        strategy = Trainer(strategy=strategy, devices=1, **QUIET).strategy
    copied = clone(strategy)
    assert type(copied) is type(strategy)
    config = copied.engine.config if bound else copied.config
    assert (config.precision, config.float8.emulate) == ("fp8", True)


@pytest.mark.parametrize("first", ["kpt_lightning", "lightning.pytorch"])
def test_the_name_kpt_is_known_whichever_package_is_imported_first(first: str) -> None:
    second = {"kpt_lightning": "lightning.pytorch", "lightning.pytorch": "kpt_lightning"}[first]
    code = (
        f"import {first}, {second}; from lightning.pytorch import Trainer; from lightning.fabric import Fabric\n"
        "t = Trainer(strategy='kpt', accelerator='cpu', logger=False)\n"
        "f = Fabric(strategy='kpt', accelerator='cpu')\n"
        "print(type(t.strategy).__name__, type(f.strategy).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1:] == ["KptSingleDevice KptFabricSingleDevice"], done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:No seed found")  # between Lightning and jsonargparse
def test_lightning_cli_builds_it_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"float8": {**EMULATED["float8"], "odd_dims": "pad"}}
    settings = {
        "trainer": {
            "strategy": {
                "class_path": "kpt_lightning.KptStrategy",
                "init_args": {"config": config, "precision": "fp8", "level": "balanced"},
            },
            **{**QUIET, "limit_train_batches": 2, "limit_val_batches": 0},
        }
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(path)])
    cli = LightningCLI(BoringModel, BoringDataModule, save_config_callback=None)
    assert type(cli.trainer.strategy) is KptSingleDevice
    assert cli.trainer.strategy.plan.precision == "fp8"


def test_a_config_file_gives_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "kpt.yaml"
    path.write_text("precision: fp8\nfloat8: {emulate: true, only_where_it_pays: false, recipe: rowwise}\n")
    trainer = Trainer(strategy=KptStrategy(str(path)), **QUIET)
    trainer.fit(Net(), loader())
    assert trainer.strategy.plan.config.float8.recipe == "rowwise"


@pytest.mark.parametrize(
    ("strategy", "arguments", "words"),
    [
        (lambda: KptStrategy(precision="bf16-mixed"), {"precision": "32-true"}, ["Trainer(precision)", "bf16-mixed"]),
        (lambda: KptStrategy(EMULATED, precision="fp8"), {"plugins": [KptPrecision("32")]}, ["plugins", "fp8"]),
        (lambda: KptSingleDevice(precision="32"), {"precision": "bf16-mixed"}, ["Trainer(precision)", "'32'"]),
        (lambda: KptSingleDevice(), {"devices": 2}, ["Trainer(devices)=2", "KptSingleDevice"]),
        (lambda: KptSingleDevice("cuda:0"), {"devices": 1}, ["KptSingleDevice(device)", "cuda:0", "accelerator"]),
        (lambda: KptStrategy(parallel="single"), {"devices": 2}, ["Trainer(devices)=2", "one device"]),
        (lambda: KptStrategy(parallel="single"), {"num_nodes": 2, "devices": 1}, ["Trainer(num_nodes)=2"]),
        (lambda: KptDDP(parallel_devices=[torch.device("cpu")] * 2), {"devices": 3}, ["Trainer(devices)=3", "KptDDP"]),
        (lambda: KptDDP({"parallel": "fsdp2"}), {}, ["parallel='fsdp2'", "KptDDP"]),
        (
            lambda: KptStrategy({"float8": {"recipe": "rowwise"}}),
            {"precision": "64-true"},
            ["64-true", "float8 section"],
        ),
        (
            lambda: KptStrategy({"float8": {"recipe": "rowwise"}}),
            {"plugins": [KptPrecision("fp8", float8=EMULATED["float8"])]},
            ["KptPrecision(float8)", "KptStrategy(float8="],
        ),
        (
            lambda: KptStrategy(level="conservative"),
            {"plugins": [KptPrecision("fp8", float8=EMULATED["float8"])]},
            ["conservative"],
        ),
    ],
)
def test_settings_that_contradict_raise_one_sentence_that_names_both(
    strategy: Any, arguments: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        Trainer(strategy=strategy(), **arguments, **QUIET)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("given", "used"),
    [("bf16-mixed", "bf16-mixed"), ("32-true", "32"), (32, "32"), ("bf16-true", "bf16"), ("64-true", "64-true")],
)
def test_precision_of_the_trainer_wins_over_auto(given: Any, used: str) -> None:
    trainer = Trainer(strategy=KptStrategy(), precision=given, **QUIET)
    trainer.fit(Net(), loader())
    assert trainer.strategy.plan.precision == used
    assert trainer.precision == used


def test_a_kpt_precision_plugin_beside_auto_is_used() -> None:
    plugin = KptPrecision("fp8", float8=EMULATED["float8"])
    trainer = Trainer(strategy=KptStrategy(), plugins=[plugin], **QUIET)
    trainer.fit(Net(), loader())
    assert trainer.strategy.plan.precision == "fp8"


def test_fabric_refuses_a_second_precision_too() -> None:
    with pytest.raises(ConfigError, match=r"Fabric\(precision\)"):
        Fabric(strategy=KptStrategy(precision="32"), precision="bf16-mixed", accelerator="cpu")


def test_the_trainer_of_the_other_package_is_refused_with_the_way_out() -> None:
    import pytorch_lightning

    with pytest.raises(ConfigError, match=r"not with pytorch_lightning\.Trainer.*'from lightning\.pytorch import"):
        pytorch_lightning.Trainer(strategy=KptStrategy(), accelerator="cpu", logger=False)


def test_fp8_without_a_unit_is_refused_before_training_and_names_the_machine() -> None:
    from kpt_lightning.hardware import detect

    with pytest.raises(UnsupportedHardwareError) as caught:
        Trainer(strategy=KptStrategy(precision="fp8"), **QUIET)
    assert detect().host.name in str(caught.value)
    assert "emulate" in str(caught.value)


def test_everything_is_undone_after_fit_and_done_again_for_validation() -> None:
    module = Net()
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    trainer = Trainer(strategy=KptStrategy(EMULATED, precision="fp8"), **QUIET)
    trainer.fit(module, loader())
    assert {kind.__name__ for kind in module.seen} == {"Float8Linear"}
    assert type(module.net[0]) is nn.Linear
    module.seen.clear()
    trainer.validate(module, loader(), verbose=False)
    assert {kind.__name__ for kind in module.seen} == {"Float8Linear"}
    assert type(module.net[0]) is nn.Linear
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == before


def test_everything_is_undone_after_an_exception_in_the_middle_of_fit() -> None:
    module = Net(fail_at=2)
    with pytest.raises(RuntimeError, match="in the middle of fit"):
        Trainer(strategy=KptStrategy(EMULATED, precision="fp8"), **QUIET).fit(module, loader())
    assert module.seen[-1].__name__ == "Float8Linear"
    assert type(module.net[0]) is nn.Linear
    assert "float8" not in vars(module.net[0])


def test_fp8_in_the_trainer_follows_fp32_training() -> None:
    losses = {}
    for precision, config in (("32", None), ("fp8", EMULATED)):
        torch.manual_seed(0)
        module = Net()
        trainer = Trainer(strategy=KptStrategy(config, precision=precision), **{**QUIET, "max_epochs": 10})
        trainer.fit(module, loader())
        x, y = loader().dataset[:]
        with torch.no_grad():
            losses[precision] = float(nn.functional.mse_loss(module.net(x), y))
    assert losses["fp8"] == pytest.approx(losses["32"], rel=0.02)


def test_a_leaf_in_a_second_trainer_checks_that_trainers_settings_too() -> None:
    leaf = KptSingleDevice()
    Trainer(strategy=leaf, **{**QUIET, "accelerator": "auto"}, devices=1)
    leaf._accelerator = None  # Lightning keeps it on the strategy and would refuse any accelerator
    second = Trainer(strategy=leaf, precision="bf16-mixed", **QUIET)
    second.fit(Net(), loader())
    assert second.strategy.plan.precision == "bf16-mixed"
    leaf._accelerator = None
    with pytest.raises(ConfigError, match=r"Trainer\(devices\)=2"):
        Trainer(strategy=leaf, devices=2, **QUIET)


def test_the_default_dtype_of_the_user_stays_in_configure_model() -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = nn.Sequential(nn.Linear(32, 32))

    module = Late()
    x = torch.randn(8, 32, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        Trainer(strategy=KptStrategy(), **QUIET).fit(module, DataLoader(TensorDataset(x, x), batch_size=4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert module.net[0].weight.dtype == torch.float64


def test_fabric_takes_two_models_where_nothing_is_changed_and_refuses_them_where_something_is() -> None:
    plain = Fabric(strategy=KptStrategy(), accelerator="cpu", devices=1)
    for _ in range(2):
        model = nn.Linear(32, 32)
        plain.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    fp8 = Fabric(strategy=KptStrategy(EMULATED, precision="fp8"), accelerator="cpu", devices=1)
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    fp8.setup(first)
    with pytest.raises(KptError, match="one engine serves one model"):
        fp8.setup(second)


def test_a_plugin_beside_the_strategy_has_the_plan() -> None:
    plugin = KptPrecision("fp8", float8=EMULATED["float8"])
    trainer = Trainer(strategy=KptStrategy(level="balanced"), plugins=[plugin], **QUIET)
    trainer.fit(Net(), loader())
    assert trainer.precision_plugin is plugin
    assert plugin.plan is trainer.strategy.plan
