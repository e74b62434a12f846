"""The FP8 kernels reach unmodified transformers models through KptStrategy, with the loss of plain Lightning."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from kpt_lightning import KptStrategy
from kpt_lightning.precision.gemm import GemmCounts, count_gemms

pytestmark = pytest.mark.usefixtures("every_size")

ROOT = Path(__file__).parents[2]

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
CONFIG = {"precision": "fp8", "level": "aggressive", "float8": {"emulate": True, "only_where_it_pays": False}}
ALL = {"float8", "float8_cross_entropy", "float8_mlp", "float8_siblings"}

MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES)),
    "tied head": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "biases": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2, biases of q, k, v": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**SIZES)),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SIZES)),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(**SIZES)),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**SIZES, query_pre_attn_scalar=16)),
}
WITHOUT = {
    "biases": ("float8_mlp", "a bias, which the kernels do not add"),
    "gemma2": ("float8_cross_entropy", "changes the logits between head and loss"),
}


# peft and transformers each name what the other has deprecated.
others_deprecate = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


class Language(LightningModule):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.losses: list[float] = []

    def training_step(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.network(input_ids=ids, labels=ids).loss
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, ids: Tensor) -> None:
        self.log("held_out", self.network(input_ids=ids, labels=ids).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], 1e-3)


def network(model: str, lora: bool = False, checkpointing: bool = False) -> Any:
    torch.manual_seed(0)
    kind, config = MODELS[model]
    made = kind(config)
    if checkpointing:
        made.gradient_checkpointing_enable()
    if not lora:
        return made
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    return peft.get_peft_model(made, settings)


def trained(strategy: Any, made: Any, **options: Any) -> tuple[Language, Trainer, GemmCounts]:
    module = Language(made)
    ids: Any = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        strategy=strategy, max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    with count_gemms() as counts:
        trainer.fit(module, DataLoader(ids, batch_size=4), DataLoader(ids[:4], batch_size=4))
    return module, trainer, counts


def planned(trainer: Any) -> set[str]:
    return {change.candidate for change in trainer.strategy.plan.changes}


@pytest.mark.parametrize("model", MODELS)
def test_training_evaluation_and_generation_are_those_of_the_plain_model(model: str) -> None:
    module, trainer, counts = trained(KptStrategy(CONFIG), network(model))
    plain, beside, _ = trained("auto", network(model))
    left_out, reason = WITHOUT.get(model, (None, ""))
    assert planned(trainer) == ALL - {left_out}
    assert counts.merged
    if left_out:
        assert reason in trainer.strategy.plan.explain(left_out)[0].reason  # type: ignore[attr-defined]
    assert module.losses == pytest.approx(plain.losses, abs=0.01)
    assert float(trainer.callback_metrics["held_out"]) == pytest.approx(
        float(beside.callback_metrics["held_out"]), abs=0.01
    )
    made = module.network.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 7)


@others_deprecate
@pytest.mark.parametrize("how", [{"checkpointing": True}, {"accumulate_grad_batches": 2}], ids=str)
def test_checkpointing_and_accumulation_change_nothing_of_it(how: dict[str, Any]) -> None:
    made = {key: value for key, value in how.items() if key == "checkpointing"}
    options = {key: value for key, value in how.items() if key not in made}
    module, trainer, counts = trained(KptStrategy(CONFIG), network("llama", **made), **options)
    plain, _, _ = trained("auto", network("llama", **made), **options)
    assert planned(trainer) == ALL
    assert counts.merged
    assert module.losses == pytest.approx(plain.losses, abs=0.01)


@others_deprecate
def test_a_frozen_base_runs_in_fp8_without_gradients_of_its_weights() -> None:
    made = network("llama", lora=True)
    base = {name: each.clone() for name, each in made.named_parameters() if not each.requires_grad}
    # Adapters are too small to gain.
    config = CONFIG | {"float8": CONFIG["float8"] | {"include": ["*base_layer"]}}  # type: ignore[operator]
    module, trainer, counts = trained(KptStrategy(config), made)
    plain, _, _ = trained("auto", network("llama", lora=True))
    assert {"float8", "float8_siblings"} <= planned(trainer)
    assert counts.merged
    assert not [sizes for sizes in counts.calls if sizes[0] == "grad_weight" and sizes[1:] == (64, 64, 96)]
    assert module.losses == pytest.approx(plain.losses, abs=0.01)
    after = dict(module.network.named_parameters())
    assert all(torch.equal(each, after[name]) for name, each in base.items())


def test_two_processes_have_one_plan_and_the_same_weights(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER", "LOCAL_RANK"))}
    command = [sys.executable, "-m", "tests.strategies.kernel_worker", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["rank"], second["rank"]) == (0, 1)
    assert {change["candidate"] for change in first["plan"]} == ALL
    assert first["plan"] == second["plan"]
    assert first["weights"] == second["weights"]
    assert first["losses"] != second["losses"]
    assert first["merged"] == second["merged"] > 0


class Gated(LightningModule):
    """What is no transformers model: plain linear layers, and the example that Lightning knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(32, 64), torch.nn.Linear(32, 64)
        self.last = torch.nn.Linear(64, 32)
        self.example_input_array = torch.randn(16, 32)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)) * self.second(x))
        return out

    def training_step(self, x: Tensor) -> Tensor:
        loss = (self(x) - x).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def test_plain_linear_layers_get_them_by_the_example_of_their_module() -> None:
    losses, merged = {}, 0
    for name, strategy in (("kpt", KptStrategy(CONFIG)), ("plain", "auto")):
        module = Gated()
        trainer = Trainer(
            strategy=strategy, max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with count_gemms() as counts:
            trainer.fit(module, DataLoader(torch.randn(32, 32), batch_size=8))  # type: ignore[arg-type]
        if name == "kpt":
            assert {"float8", "float8_siblings"} <= planned(trainer)
            merged = counts.merged
        losses[name] = module.losses
    assert merged
    assert losses["kpt"] == pytest.approx(losses["plain"], abs=0.05)
