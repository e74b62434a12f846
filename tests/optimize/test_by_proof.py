"""A plan by rules is extended by what proves itself on inputs that the model makes, and by nothing else."""

from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kpt_lightning import KptStrategy
from kpt_lightning.candidates import float8_mlp
from kpt_lightning.decision import Rejected
from tests.optimize.started import EMULATED, batch, engine, llama, state


def looked(model: nn.Module, **settings: Any) -> Any:
    started = engine(**settings)
    started.start(model, "cpu")
    started.look()
    return started


def test_the_kernels_of_this_package_are_planned_and_the_model_is_put_back() -> None:
    model = llama()
    before, weights = state(model), {name: each.clone() for name, each in model.state_dict().items()}
    random = torch.get_rng_state()
    started = looked(model)
    assert [change.candidate for change in started.plan.changes] == ["float8", "float8_mlp", "float8_siblings"]
    assert started.plan.accepts("float8_mlp")
    assert "dB and better" in started.plan.explain("float8_mlp")[0].reason
    assert "needs level 'aggressive'" in started.plan.explain("float8_cross_entropy")[0].reason
    with started.autocast():
        model(**batch()).loss.backward()
    assert all(each.grad is not None for each in model.parameters())
    model.zero_grad(set_to_none=True)
    started.stop()
    assert state(model) == before
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_head_joins_its_loss_at_the_aggressive_level_in_place_of_a_compiled_loss() -> None:
    plan = looked(llama(), level="aggressive", compile={"loss": True}).plan
    names = [change.candidate for change in plan.changes]
    assert "float8_cross_entropy" in names
    assert "lm_head" not in plan.float8_layers
    assert "compile_loss" not in names
    (loss,) = plan.explain("compile loss")
    assert isinstance(loss, Rejected)
    assert loss.reason == "head and loss run as one in FP8"


def test_layers_too_small_by_themselves_are_told_to_run_beside_others() -> None:
    sizes = {"hidden_size": 1280, "intermediate_size": 1040, "num_hidden_layers": 1, "num_attention_heads": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, num_key_value_heads=1, **sizes))
    started = engine(float8={"emulate": True})
    (before,) = started.start(model, "cpu").explain("model.layers.0.self_attn.k_proj")
    assert not before
    started.look()
    (verdict,) = started.plan.explain("model.layers.0.self_attn.k_proj")
    assert verdict
    assert verdict.reason.startswith(f"{before.reason}; but it costs nothing beside")
    assert "7 of 8 linear layers in FP8" in started.plan.summary()


def test_a_plan_with_nothing_in_fp8_is_left_alone() -> None:
    started = looked(llama(), precision="32", float8={})
    assert started.plan.changes == []
    assert started.plan.explain("float8_mlp") == []


@pytest.mark.parametrize("kind", ["plain", "vit"])
def test_what_cannot_be_looked_at_says_why(kind: str) -> None:
    if kind == "plain":
        model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        subject, reason = "float8 kernels", "no transformers model inside"
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, **sizes))
        subject, reason = "float8_mlp", "failed to look"
    before = state(model)
    started = looked(model)
    (why,) = started.plan.explain(subject)
    assert isinstance(why, Rejected)
    assert reason in why.reason
    assert [change.candidate for change in started.plan.changes] == ["float8"]
    started.stop()
    assert state(model) == before


def test_kernels_that_do_not_hold_are_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    right = float8_mlp.float8_gated.gated_quantize

    def off(*args: Any, **options: Any) -> Any:
        rows, columns, scale = right(*args, **options)
        return rows, columns, scale * 2

    monkeypatch.setattr(float8_mlp.float8_gated, "gated_quantize", off)
    plan = looked(llama()).plan
    assert "float8_mlp" not in [change.candidate for change in plan.changes]
    assert "are needed" in plan.explain("float8_mlp")[0].reason


class Language(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = llama()
        self.losses: list[float] = []

    def training_step(self, data: Tensor) -> Tensor:
        loss: Tensor = self.network(input_ids=data, labels=data).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def trained(strategy: Any) -> tuple[Language, Trainer]:
    module = Language()
    ids = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        strategy=strategy, max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(ids, batch_size=4))  # type: ignore[arg-type]
    return module, trainer


@pytest.mark.parametrize(("precision", "weights"), [("fp8", torch.float32), ("fp8-true", torch.bfloat16)])
def test_a_trainer_with_kpt_strategy_trains_through_them_and_proves_it(precision: str, weights: torch.dtype) -> None:
    config = {"precision": precision, "level": "aggressive", "float8": EMULATED}
    module, trainer = trained(KptStrategy(config))
    assert {each.dtype for each in module.parameters()} == {weights}
    plan: Any = trainer.strategy.plan  # type: ignore[attr-defined]
    names = {change.candidate for change in plan.changes}
    assert names == {"float8", "float8_mlp", "float8_siblings", "float8_cross_entropy"}
    assert plan.precision == precision
    assert all(plan.explain("fp8 calls")), plan.proofs
    plain, _ = trained("auto")
    assert module.losses == pytest.approx(plain.losses, rel=0.01)
