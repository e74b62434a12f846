from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from kpt_lightning.errors import ConfigError
from kpt_lightning.huggingface import KptTrainerCallback, Session
from kpt_lightning.huggingface.patches import patched
from kpt_lightning.precision.float8_linear import Float8Linear
from tests.huggingface.conftest import FP8
from tests.huggingface.tiny import examples, llama


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**settings, **changes})


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_trains_in_fp8_and_proves_it(tmp_path: Path) -> None:
    callback = KptTrainerCallback(FP8)
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=examples(), callbacks=[callback])
    trainer.train()
    assert callback.plan is not None
    assert {proof.subject for proof in callback.plan.proofs if proof} >= {"fp8 calls"}
    assert sum(isinstance(module, Float8Linear) for module in trainer.model.modules()) == 14
    assert trainer.evaluate(examples(8))["eval_loss"] > 0
    assert trainer.model.generate(torch.zeros(1, 4, dtype=torch.long), max_new_tokens=2).shape == (1, 6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"auto_find_batch_size": True},
        {"torch_compile": True, "torch_compile_backend": "eager", "bf16": True},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_an_unmodified_trainer_follows_the_plain_losses(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = Trainer(llama(), arguments(tmp_path, **changes), train_dataset=examples())
    plain.train()
    session = Session(FP8)
    with patched(session):
        trainer = Trainer(llama(), arguments(tmp_path, **changes), train_dataset=examples())
        trainer.train()
    (plan,) = session.plans
    assert {proof.subject for proof in plan.proofs if proof} >= {"fp8 calls"}
    assert losses(trainer) != losses(plain)
    assert losses(trainer) == pytest.approx(losses(plain), rel=0.01)
    session.stop()


def test_beside_the_launcher_the_callback_does_nothing(tmp_path: Path) -> None:
    session, callback = Session(FP8), KptTrainerCallback(FP8)
    with patched(session):
        Trainer(llama(), arguments(tmp_path), train_dataset=examples(), callbacks=[callback]).train()
    assert len(callback.session.plans) + len(session.plans) == 1


def test_a_model_made_later_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        args=arguments(tmp_path), model_init=llama, train_dataset=examples(), callbacks=[KptTrainerCallback(FP8)]
    )
    with pytest.raises(ConfigError, match="model_init"):
        trainer.train()


def test_what_the_trainer_saves_loads_without_us(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    callback = KptTrainerCallback(FP8)
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=examples(), callbacks=[callback])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
