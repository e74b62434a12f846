import inspect
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

from kpt_lightning.errors import ConfigError
from kpt_lightning.huggingface import Session
from kpt_lightning.huggingface.patches import patched
from kpt_lightning.huggingface.tracking_callback import KptRunCallback
from tests.huggingface.conftest import FP8
from tests.huggingface.test_trainer_callback import arguments, losses
from tests.huggingface.tiny import examples, llama

METHODS = ("__init__", "prepare", "prepare_model", "init_trackers", "save_state", "load_state")


def test_each_method_is_accelerates_own_and_public() -> None:
    assert all(callable(vars(Accelerator)[name]) for name in METHODS)


def test_the_trainers_private_method_has_the_form_that_we_wrap() -> None:
    assert [*inspect.signature(Trainer._save_checkpoint).parameters] == ["self", "model", "trial"]


@pytest.mark.parametrize("fails", [False, True])
def test_accelerate_is_as_before_afterwards(fails: bool) -> None:
    before = {name: vars(Accelerator)[name] for name in METHODS}
    try:
        with patched(Session()):
            assert all(vars(Accelerator)[name] is not before[name] for name in METHODS)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert {name: vars(Accelerator)[name] for name in METHODS} == before


def test_a_method_that_the_script_replaced_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(self: object, *objects: object) -> object:
        return objects

    monkeypatch.setattr(Accelerator, "prepare", Accelerator.prepare)
    with patched(Session()):
        Accelerator.prepare = mine
    assert vars(Accelerator)["prepare"] is mine


def test_accelerates_own_fp8_is_refused_when_the_accelerator_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    with patched(Session()):
        Accelerator()
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp8")
        with pytest.raises(ConfigError, match="mixed_precision='fp8'"):
            Accelerator()


def test_the_trainers_checkpoints_tell_the_plan_and_resume(tmp_path: Path) -> None:
    before = vars(Trainer)["_save_checkpoint"]
    session = Session(FP8)
    with patched(session):
        settings = arguments(tmp_path, save_strategy="steps", save_steps=2)
        whole = Trainer(llama(), settings, train_dataset=examples())
        whole.train()
        again = Trainer(llama(), settings, train_dataset=examples())
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert vars(Trainer)["_save_checkpoint"] is before
    assert (tmp_path / "checkpoint-2" / "kpt_state.json").is_file()
    assert losses(again) == losses(whole)
    session.stop()


def test_a_state_is_saved_whole_and_loaded(tmp_path: Path) -> None:
    session = Session(FP8)
    with patched(session):
        accelerator = Accelerator()
        model = accelerator.prepare(llama())
        accelerator.save_state(tmp_path / "saved", safe_serialization=True)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data.zero_()
        accelerator.load_state(tmp_path / "saved")
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    assert (tmp_path / "saved" / "kpt_state.json").is_file()
    session.stop()


@pytest.mark.filterwarnings("ignore:.*too few")
def test_report_to_kpt_keeps_the_run_with_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = Session(FP8)
    with patched(session):
        trainer = Trainer(llama(), arguments(tmp_path, report_to=["kpt"], max_steps=8), train_dataset=examples())
        trainer.train()
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, KptRunCallback)]
    assert callback.record is not None
    assert callback.record.key.precision == "fp8"
    assert callback.record.plan is not None
    session.stop()
