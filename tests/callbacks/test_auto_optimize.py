"""AutoOptimizeCallback in real Trainers: with KptStrategy and without, resumed, with two processes, and refused."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from kpt_lightning import AutoOptimizeCallback, KptStrategy, RegressionCallback
from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Change
from kpt_lightning.config import KptConfig, Level
from kpt_lightning.errors import ConfigError, KptError
from kpt_lightning.optimize import search
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.tracking.store import RunStore
from tests.optimize.faults import Made, Tiny, faster, set_on

NAP = 0.03


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = [Made("honest", lambda module: faster(module.model))]
    monkeypatch.setattr(registry, "candidates", lambda: tuple(found))
    monkeypatch.setattr(search, "ROUNDS", 6)
    return found


class Module(LightningModule):
    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.model = Tiny(nap=NAP)
        self.dropout = torch.nn.Dropout(0.1)
        self.how, self.seen = how, 0

    def training_step(self, batch: Tensor, index: int) -> Any:
        self.seen += 1
        if self.how == "gathers":
            self.all_gather(batch)
        loss = self.model(self.dropout(batch))
        self.log("train_loss", loss)
        if self.how == "fails" and self.global_step > 1:
            raise ValueError("bad luck")
        return {"dict": {"loss": loss}, "nothing": None}.get(self.how, loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(*callbacks: Any, module: Module | None = None, epochs: int = 1, ckpt: Any = None, **options: Any) -> Any:
    seed_everything(0)
    module = module or Module()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False, limit_train_batches=4,
        enable_model_summary=False, enable_checkpointing=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    data = torch.randn(40, 8, 32, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, DataLoader(list(data), batch_size=4), ckpt_path=ckpt)
    return trainer


def callback(**more: Any) -> AutoOptimizeCallback:
    return AutoOptimizeCallback(**({"cache": False, "print_plan": False} | more))


@pytest.mark.parametrize("kpt", [False, True])
@pytest.mark.parametrize("how", ["", "dict"])
def test_it_trains_bit_for_bit_as_without_it_and_keeps_what_is_faster(kpt: bool, how: str) -> None:
    more = {"strategy": KptStrategy()} if kpt else {}
    plain, tried = Module(how), Module(how)
    fit(module=plain, **more)
    auto = callback()
    trainer = fit(auto, module=tried, **({"strategy": KptStrategy()} if kpt else {}))
    assert auto.plan is not None
    assert [change.candidate for change in auto.plan.changes] == ["honest"]
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), tried.parameters(), strict=True))
    assert tried.seen == plain.seen == 4
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert tried.model.nap == NAP  # undone at the end of the run
    assert not {"log", "log_dict"} & set(vars(tried))
    if kpt:
        assert trainer.strategy.plan.basis == "trial"


def test_the_record_of_the_run_and_the_checkpoint_hold_the_plan_and_a_resumed_run_tries_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = callback()
    store = tmp_path / "runs.sqlite"
    trainer = fit(auto, RegressionCallback(store, print_report=False))
    (record,) = RunStore(store).all()
    assert record.plan is not None
    assert [each["candidate"] for each in record.plan["changes"]] == ["honest"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["kpt_lightning.AutoOptimizeCallback"]
    assert stored["plan"]["basis"] == "trial"
    capsys.readouterr()
    again = callback()
    fit(again, epochs=2, ckpt=tmp_path / "last.ckpt")
    assert "unchanged:" not in capsys.readouterr().err
    assert again.plan is not None
    assert again.plan.to_dict()["trials"] == stored["plan"]["trials"]


@pytest.mark.parametrize("differs", ["model", "level", "second fit"])
def test_the_plan_of_a_checkpoint_is_for_its_model_its_level_and_one_run(
    tmp_path: Path, pool: list[Any], differs: str
) -> None:
    pool[0].level = Level.BALANCED
    fit(callback()).save_checkpoint(tmp_path / "last.ckpt")
    again, module = callback(level="conservative" if differs == "level" else None), Module()
    if differs == "model":
        module.model.layers[0].norm.eps = 1e-4
    if differs == "second fit":
        fit(again, module=module, epochs=2, ckpt=tmp_path / "last.ckpt")
        assert again._restored is None
        pool.clear()
        fit(again, module=module)
    else:
        with pytest.warns(UserWarning, match="plan in the checkpoint is not used: .*" + differs):
            fit(again, module=module, epochs=2, ckpt=tmp_path / "last.ckpt")
    assert again.plan is not None
    kept = [change.candidate for change in again.plan.changes]
    assert kept == (["honest"] if differs == "model" else [])


def test_a_second_run_takes_the_kept_plan(tmp_path: Path) -> None:
    fit(callback(cache=tmp_path))
    again = callback(cache=tmp_path)
    fit(again)
    assert again.plan is not None
    assert "earlier run" in again.plan.basis


def test_the_plan_replays_in_a_strategy_from_its_json(tmp_path: Path) -> None:
    auto = callback()
    fit(auto, strategy=KptStrategy())
    assert auto.plan is not None
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(auto.plan.to_dict()))
    trainer = fit(strategy=KptStrategy(plan=file))
    assert [change.candidate for change in trainer.strategy.plan.changes] == ["honest"]
    with pytest.raises(ConfigError, match="beside plan"):
        KptStrategy(plan=file, level="aggressive")


def test_a_crash_after_the_trial_leaves_the_module_as_it_was() -> None:
    module = Module("fails")
    with pytest.raises(ValueError, match="bad luck"):
        fit(callback(), module=module)
    assert module.model.nap == NAP


def interrupted(module: Any) -> Any:
    def step(*args: Any) -> None:
        raise KeyboardInterrupt

    return set_on(module, "training_step", step)


def test_ctrl_c_in_a_trial_ends_the_run_with_the_module_as_it_was(pool: list[Any]) -> None:
    pool[:] = [Made("interrupted", interrupted)]
    module = Module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(callback(), module=module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not {"log", "log_dict", "training_step"} & set(vars(module))


def test_what_cannot_take_effect_raises_before_training() -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ConfigError, match="manual optimization"):
        fit(callback(), module=Manual())
    with pytest.raises(ConfigError, match="max_seconds"):
        callback(max_seconds=0)
    with pytest.raises(ConfigError, match="KptStrategy"):
        fit(callback(level="aggressive"), strategy=KptStrategy())
    with pytest.raises(KptError, match="no scalar loss"):
        fit(callback(), module=Module("nothing"))


SCRIPT = """
import sys, torch
from pathlib import Path
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader
from kpt_lightning import AutoOptimizeCallback, KptStrategy
from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Change
from kpt_lightning.config import KptConfig
from kpt_lightning.optimize import search
from kpt_lightning.optimize.plan import Plan
from tests.callbacks.test_auto_optimize import Module
from tests.optimize.faults import Made, faster

if __name__ == "__main__":
    registry.candidates = lambda: (Made("honest", lambda module: faster(module.model)),)
    search.ROUNDS = 6
    if sys.argv[3] == "search fails":
        registry.candidates = lambda: 1 / 0
    seed_everything(0)
    auto = AutoOptimizeCallback(cache=False, print_plan=False)
    strategy = KptStrategy(parallel="ddp") if sys.argv[1] == "kpt" else "ddp"
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_train_batches=3,
        callbacks=[auto] if sys.argv[2] == "auto" else [])
    module = Module(sys.argv[3])
    if sys.argv[3] == "sync":
        module.model.norm = torch.nn.SyncBatchNorm(4)
    trainer.fit(module, DataLoader(list(torch.randn(40, 8, 32)), batch_size=4))
    kept = [] if auto.plan is None else [change.candidate for change in auto.plan.changes]
    total = float(sum(each.detach().double().sum() for each in module.parameters()))
    # A file each: what two processes print at once runs into each other.
    Path(sys.argv[0]).with_name(f"rank_{trainer.global_rank}").write_text(f"{kept} {total!r} {module.seen}")
"""


def two_ranks(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "train.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", str(tmp_path / "train.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)


@pytest.mark.parametrize("strategy", ["ddp", "kpt"])
def test_with_two_processes_rank_0_tries_and_both_follow_its_plan(tmp_path: Path, strategy: str) -> None:
    found: dict[str, list[str]] = {}
    for auto in ("auto", "plain"):
        folder = tmp_path / auto
        folder.mkdir()
        answer = two_ranks(folder, strategy, auto, "")
        assert answer.returncode == 0, answer.stderr[-3000:]
        found[auto] = [(folder / f"rank_{rank}").read_text() for rank in (0, 1)]
    for tried, plain in zip(found["auto"], found["plain"], strict=True):
        assert tried.startswith("['honest'] ")
        assert tried.split()[1:] == plain.split()[1:]  # the same weights and the same number of steps


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nothing", "no scalar loss"),
        ("gathers", "exchanges data with other processes"),
        ("search fails", "ZeroDivisionError"),
        ("sync", "is a SyncBatchNorm, which waits"),
    ],
)
def test_with_two_processes_a_failure_of_rank_0_ends_both(tmp_path: Path, how: str, says: str) -> None:
    answer = two_ranks(tmp_path, "ddp", "auto", how)
    assert answer.returncode != 0
    assert answer.stderr.count(says) >= 2


def test_a_plan_with_a_fused_optimizer_replays_in_a_strategy_and_its_checkpoints_are_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the candidates of the package themselves
    plan = Plan(config=KptConfig.build({}), device="cpu", precision="32", parallel="single")
    plan.changes = [Change(candidate="fused_optimizer", setting={"optimizer": "SGD"})]
    used: list[Any] = []

    class Adam(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            used.append(self.optimizers().optimizer.param_groups[0]["fused"])
            self.trainer.save_checkpoint(tmp_path / "during.ckpt")

    trainer = fit(strategy=KptStrategy(plan=plan), module=Adam())
    assert used == [True] * 4
    assert trainer.optimizers[0].param_groups[0]["fused"] is None
    saved = torch.load(tmp_path / "during.ckpt", weights_only=True)["optimizer_states"][0]
    assert saved["param_groups"][0]["fused"] is None
    fit(strategy=KptStrategy(plan=plan), module=Adam(), ckpt=tmp_path / "during.ckpt", epochs=2)
    assert used == [True] * 8
