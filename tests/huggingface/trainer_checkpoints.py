"""Run by test_trainer_checkpoint.py: a Hugging Face Trainer that stops, resumes and is killed while it saves.

python trainer_checkpoints.py FOLDER
"""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from killed_saves import killed
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kpt_lightning.huggingface.session import Session
from kpt_lightning.huggingface.trainer_checkpoint import atomic_save_checkpoint

FP8 = {"precision": "fp8", "float8": {"emulate": True, "only_where_it_pays": False}, "compile": {"blocks": True}}


class AtomicTrainer(Trainer):  # type: ignore[misc]
    """As the launcher's patch makes it."""

    session: Session | None = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        atomic_save_checkpoint(self, super()._save_checkpoint, model, trial, session=self.session)


def main() -> None:
    base = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    found: dict[str, Any] = {}
    for name, config in {"plain": None, "fp8": FP8}.items():
        whole = trainer(base / name, config)
        whole.train()
        shutil.copytree(base / name / "checkpoint-2", base / f"{name}_resumed" / "checkpoint-2")
        resumed = trainer(base / f"{name}_resumed", config)
        resumed.train(resume_from_checkpoint=True)
        keys = load_file(base / name / "checkpoint-4" / "model.safetensors")
        whole.save_model(str(base / name / "exported"))
        exported = LlamaForCausalLM.from_pretrained(base / name / "exported")
        found[name] = {
            "losses": losses(whole), "resumed": losses(resumed), "folders": sorted(os.listdir(base / name)),
            "keys": sorted(f"{key} {value.dtype}" for key, value in keys.items()), "best": best(base / name),
            "exported": all(torch.equal(exported.state_dict()[key], value) for key, value in keys.items()),
            "layers": 0 if whole.session is None else len(whole.session.plans[0].float8_layers),
        }  # fmt: skip
    found["killed"], found["killed_plain"] = kills(base, AtomicTrainer), kills(base, Trainer)
    print("RESULT " + json.dumps(found))


def trainer(folder: Path, config: Any, *, kind: type[Trainer] = AtomicTrainer) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))
    rows = torch.randint(64, (16, 8)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    made = kind(
        model=model,
        args=TrainingArguments(
            str(folder), max_steps=4, save_steps=2, eval_steps=2, eval_strategy="steps", logging_steps=1, use_cpu=True,
            per_device_train_batch_size=4, report_to=[], disable_tqdm=True, metric_for_best_model="loss",
            load_best_model_at_end=False, save_total_limit=2, dataloader_pin_memory=False,
        ),
        train_dataset=data, eval_dataset=data[:4],
    )  # fmt: skip
    if config is not None:
        made.session = Session(config, say=lambda line: None)
        made.session.convert(made.accelerator.state, [model])
    return made


def losses(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def best(folder: Path) -> str:
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return str(Path(state["best_model_checkpoint"]).relative_to(folder))


def kills(base: Path, kind: type[Trainer]) -> list[list[str]]:
    """For each file operation at which a save of step 4 was killed: what is resumed from, and its files."""
    found = []
    for kill_at in range(1, 1000):
        folder = base / f"killed_{kind.__name__}" / str(kill_at)
        made = trainer(folder, None, kind=kind)
        made.create_optimizer_and_scheduler(num_training_steps=4)
        for made.state.global_step in (2, 4):
            save = partial(made._save_checkpoint, made.model, None)
            if made.state.global_step == 2:
                save()
            elif not killed(save, folder, kill_at):
                return found
        last = Path(get_last_checkpoint(str(folder)))
        found.append([last.name, *sorted(os.listdir(last))])
        if kind is AtomicTrainer:
            save()
            assert sorted(os.listdir(folder)) == ["checkpoint-2", "checkpoint-4"], os.listdir(folder)
    return found


if __name__ == "__main__":
    main()
