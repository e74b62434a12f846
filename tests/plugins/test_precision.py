"""KptPrecision alone in Lightning's Trainer, KptFabricPrecision alone in Fabric."""

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kpt_lightning import KptFabricPrecision, KptPrecision
from kpt_lightning.errors import ConfigError, KptError, UnsupportedHardwareError, VerificationError
from kpt_lightning.hardware import detect
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.precision.gemm import count_gemms

EMULATED = {"emulate": True, "only_where_it_pays": False}
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip
pytestmark = [
    # Lightning's advice on a loader without worker processes, and on a GPU that a test leaves alone.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class Regression(LightningModule):
    """Fits a fixed linear map; keeps what a test wants to see."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.fail_at, self.losses, self.dtypes, self.kinds = fail_at, [], set(), set()

    def step(self, batch: list[Tensor]) -> Tensor:
        out = self.net(batch[0])
        self.dtypes.add((batch[0].dtype, out.dtype))
        self.kinds.add(type(self.net[0]))
        return nn.functional.mse_loss(out.float(), batch[0].float().roll(1, -1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if index == self.fail_at:
            raise ValueError("planted")
        loss = self.step(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> DataLoader[Any]:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=32)


def fp8(recipe: str = "tensorwise", kind: Any = KptPrecision) -> Any:
    device_type = "cpu" if kind is KptFabricPrecision else None  # Fabric does not tell it
    return kind("fp8", float8={**EMULATED, "recipe": recipe}, device_type=device_type)


def fit(plugin: Any = None, model: Regression | None = None, **settings: Any) -> tuple[Regression, Trainer]:
    model = model or Regression()
    trainer = Trainer(**{**QUIET, "max_epochs": 3, "plugins": None if plugin is None else [plugin], **settings})
    trainer.fit(model, loader(), loader())
    return model, trainer


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_trainer_learns_in_fp8_as_it_does_in_bf16_and_proves_it(recipe: str) -> None:
    model, trainer = fit(fp8(recipe))
    plain, _ = fit(precision="bf16-mixed")
    assert len(model.losses) == 24
    assert model.losses[-1] < 0.8 * model.losses[0]
    assert model.losses[-1] == pytest.approx(plain.losses[-1], rel=0.03)
    assert model.losses != plain.losses
    assert model.kinds == {Float8Linear}
    assert model.dtypes == {(torch.float32, torch.bfloat16)}
    plan = trainer.precision_plugin.plan
    assert [bool(each) for name in ("calls", "kernels") for each in plan.explain(f"fp8 {name}")] == [True, False]
    assert trainer.precision == "fp8"


def test_after_fit_the_model_is_as_it_was_but_for_what_it_learned() -> None:
    model = Regression()
    keys, modules, parameters = list(model.state_dict()), list(model.modules()), list(model.parameters())
    before = model.net[0].weight.detach().clone()
    fit(fp8(), model)
    assert [type(layer) for layer in model.net] == [nn.Linear, nn.ReLU, nn.Linear]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    assert not torch.equal(model.net[0].weight, before)
    with count_gemms() as counts:
        model.net(torch.randn(16, 32))
    assert counts.total == 0


def test_after_an_exception_in_training_the_model_is_as_it_was() -> None:
    model = Regression(fail_at=3)
    with pytest.raises(ValueError, match="planted"):
        fit(fp8(), model)
    assert model.kinds == {Float8Linear}
    assert [type(layer) for layer in model.net] == [nn.Linear, nn.ReLU, nn.Linear]


def test_validation_runs_in_fp8_too() -> None:
    model = Regression()
    trainer = Trainer(**QUIET, plugins=[fp8()])
    with count_gemms() as counts:
        trainer.validate(model, loader(), verbose=False)
    assert counts.of_role("output") == counts.total == 16
    assert type(model.net[0]) is nn.Linear


@pytest.mark.parametrize(
    "settings",
    [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"num_sanity_val_steps": 0}, {"detect_anomaly": True}],
    ids=str,
)
def test_settings_of_the_trainer_work_in_fp8(settings: dict[str, Any]) -> None:
    model, trainer = fit(fp8(), **settings)
    assert model.losses[-1] < model.losses[0]
    assert trainer.precision_plugin.plan.proofs[0]


def test_one_plugin_serves_a_second_trainer_with_another_model() -> None:
    plugin = fp8()
    first, _ = fit(plugin)
    second, trainer = fit(plugin)
    assert first.losses == second.losses
    assert len(trainer.precision_plugin.plan.explain("fp8 calls")) == 1


def test_auto_follows_the_machine_and_compiles_nothing() -> None:
    model, trainer = fit(KptPrecision(), max_epochs=1)
    plan = trainer.precision_plugin.plan
    assert plan.precision in ("32", "bf16-mixed")
    assert trainer.precision == plan.precision
    assert plan.device == detect().host.name  # accelerator="cpu", also on a machine with a GPU
    assert (plan.float8_layers, plan.compiled_blocks) == ([], [])
    assert [choice.reason for choice in plan.choices if choice.subject.startswith("compile")] == ["switched off"] * 2
    assert model.kinds == {nn.Linear}


def test_bf16_casts_weights_and_floating_point_inputs() -> None:
    model, _ = fit(KptPrecision("bf16"))
    assert model.dtypes == {(torch.bfloat16, torch.bfloat16)}
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert model.losses[-1] < model.losses[0]


def test_bf16_leaves_integers_alone() -> None:
    ids = torch.arange(4)
    assert KptPrecision("bf16").convert_input({"ids": ids})["ids"] is ids


def test_bf16_gives_the_numbers_of_lightnings_bf16_true_also_for_tensors_made_in_the_forward() -> None:
    class Making(Regression):
        def step(self, batch: list[Tensor]) -> Tensor:
            return super().step([batch[0] + torch.ones(32)])

    ours, _ = fit(KptPrecision("bf16"), Making())
    theirs, _ = fit(model=Making(), precision="bf16-true")
    assert ours.losses == theirs.losses
    assert ours.dtypes == theirs.dtypes == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_other_precisions_give_the_numbers_of_lightnings_own(precision: Any) -> None:
    assert fit(KptPrecision(precision))[0].losses == fit(precision=precision)[0].losses


def test_fp8_without_a_unit_for_it_raises_at_fit_and_leaves_the_model_alone() -> None:
    model = Regression()
    with pytest.raises(UnsupportedHardwareError, match=r"float8\.emulate=True"):
        fit(KptPrecision("fp8"), model)
    assert type(model.net[0]) is nn.Linear


def test_layers_that_never_run_in_fp8_stop_training() -> None:
    class Past(Regression):
        def step(self, batch: list[Tensor]) -> Tensor:
            return nn.functional.linear(batch[0], self.net[0].weight).square().mean()

    with pytest.raises(VerificationError, match="not one FP8 GEMM ran"):
        fit(fp8(), Past())


@pytest.mark.parametrize("kind", [KptPrecision, KptFabricPrecision])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp9"}, "precision='fp9'"),
        ({"precision": "bf16", "float8": EMULATED}, "would be ignored"),
        ({"float8": EMULATED}, "emulation must be asked for"),
        ({"config": {"speed": "max"}}, "is not a setting"),
    ],
    ids=str,
)
def test_wrong_settings_raise_when_they_are_written(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**arguments)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_plugin_can_be_copied_and_pickled_before_and_after_use(copied: Any) -> None:
    plugin = fp8()
    for _ in range(2):
        model, _ = fit(copied(plugin), max_epochs=1)
        assert model.kinds == {Float8Linear}
        fit(plugin, max_epochs=1)


def fabric(plugin: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, plugins=[plugin])


@pytest.mark.parametrize("recipe", RECIPES)
def test_fabric_learns_in_fp8_and_proves_it_after_the_first_step(recipe: str) -> None:
    run = fabric(fp8(recipe, KptFabricPrecision))
    model = Regression().net
    module, optimizer = run.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for (x,) in [*loader(), *loader(), *loader()]:
        out = module(x)
        assert out.dtype == torch.float32
        loss = nn.functional.mse_loss(out, x.roll(1, -1))
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    plan = run.strategy.precision.plan
    assert losses[-1] < 0.8 * losses[0]
    assert [bool(each) for name in ("calls", "kernels") for each in plan.explain(f"fp8 {name}")] == [True, False]
    assert "2 layers" in plan.proofs[0].reason
    run.strategy.precision.teardown()
    assert type(model[0]) is nn.Linear


def test_a_second_model_of_one_fabric_is_refused_and_the_first_stays_in_fp8() -> None:
    run = fabric(fp8(kind=KptFabricPrecision))
    first = run.setup_module(Regression().net)
    with pytest.raises(KptError, match="one engine serves one model"):
        run.setup_module(Regression().net)
    with count_gemms() as counts:
        first(torch.randn(16, 32))
    assert counts.total == 2
    run.strategy.precision.teardown()


def test_fabric_casts_in_and_out_for_bf16_as_lightning_does() -> None:
    x = torch.randn(16, 32)
    outs = []
    for settings in ({"plugins": [KptFabricPrecision("bf16")]}, {"precision": "bf16-true"}):
        module = Fabric(accelerator="cpu", devices=1, **settings).setup_module(Regression().net)
        outs.append(module(x))
    assert torch.equal(*outs)
    assert outs[0].dtype == outs[1].dtype
