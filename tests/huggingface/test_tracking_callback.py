import dataclasses
import math
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from kpt_lightning.errors import ConfigError, HistoryError
from kpt_lightning.huggingface.integration import register_integration
from kpt_lightning.huggingface.tracked_run import break_off_runs
from kpt_lightning.huggingface.tracking_callback import KptRunCallback
from kpt_lightning.tracking.conclusion import RegressionError, RegressionWarning
from kpt_lightning.tracking.store import RunStore

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

ROWS = 64


class Tokens(Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        row = torch.arange(12).add(index).remainder(40)
        return {"input_ids": row, "labels": row}


def tiny_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
            max_position_embeddings=32,
        )
    )  # fmt: skip


class Slow(TrainerCallback):
    """Between the begin and the end of a step."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


class Raises(TrainerCallback):
    def __init__(self, error, at=6):
        self.error, self.at = error, at

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step >= self.at:
            raise self.error


@pytest.fixture
def train(tmp_path):
    def run(callback=None, *, others=(), resume=None, model=None, evaluate=False, **options):
        callback = callback or KptRunCallback(tmp_path / "runs.sqlite", print_report=False, warmup_steps=2)
        settings = {
            "output_dir": str(tmp_path / "out"), "max_steps": 12, "per_device_train_batch_size": 2, "use_cpu": True,
            "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, **options,
        }  # fmt: skip
        data = {"eval_dataset": Tokens()} if evaluate else {}
        trainer = Trainer(
            model or tiny_model(), TrainingArguments(**settings), train_dataset=Tokens(), callbacks=[callback, *others],
            **data,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return callback

    return run


def test_a_training_is_measured_stored_and_readable(train, tmp_path):
    callback = train()
    record = callback.record
    assert RunStore(tmp_path / "runs.sqlite").all() == [record]
    assert callback.comparison is None
    assert (record.status, record.details["steps"]) == ("finished", 12)
    assert (record.key.name, record.key.strategy, record.key.precision, record.key.device_count) == (
        "LlamaForCausalLM", "single", "32", 1
    )  # fmt: skip
    assert record.details["config"] == {"batch": [2, 12], "batches_per_step": 1}
    assert record.metrics["step_time"].n == record.metrics["data_wait"].n == 10
    assert record.metrics["tokens_per_second"].median > 0
    assert record.loss_finite is True
    assert set(record.loss_at) == {1, 2, 5, 10}


def test_the_loss_is_the_one_that_the_trainer_logs(train):
    seen = {}

    class Logged(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                seen[state.global_step] = logs["loss"]

    record = train(others=[Logged()], logging_steps=5).record
    assert record.loss_at == pytest.approx({step: seen[step] for step in (5, 10)})


@pytest.mark.parametrize("accumulated", [1, 4])
def test_accumulated_gradients_are_one_step_with_all_its_tokens(train, accumulated):
    record = train(gradient_accumulation_steps=accumulated, others=[Slow(0.02)], max_steps=9).record
    assert record.details["config"]["batches_per_step"] == accumulated
    assert record.details["steps"] == 9
    assert record.metrics["step_time"].median >= 0.02
    assert record.metrics["tokens_per_second"].median <= accumulated * 24 / 0.02


def test_evaluation_and_checkpoints_are_no_training_time(train):
    class SlowEvaluation(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            time.sleep(0.01)

    record = train(
        evaluate=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=4,
        others=[SlowEvaluation()],
    ).record
    assert 24 / record.metrics["tokens_per_second"].median < 0.05, "eight batches of evaluation take 0.08 s"
    assert record.metrics["checkpoint_stall"].n == 3
    assert 0 < record.metrics["checkpoint_stall"].median < 5


def test_the_plan_is_asked_at_the_end_and_gives_the_precision(train, tmp_path):
    plans = [{"precision": "fp8", "proofs": 0}, {"precision": "fp8", "proofs": 1}]
    callback = KptRunCallback(tmp_path / "runs.sqlite", print_report=False, plan=lambda: plans.pop(0))
    record = train(callback).record
    assert record.key.precision == "fp8"
    assert record.plan == {"precision": "fp8", "proofs": 1}


@pytest.mark.parametrize(("options", "precision"), [({"bf16": True}, "bf16-mixed"), ({}, "32")])
def test_runs_of_another_precision_have_another_key(train, options, precision):
    assert train(max_steps=3, **options).record.key.precision == precision


def slower_at_last(train, tmp_path, **options):
    """A run, four more like it, then one whose steps take three times as long."""
    first = train(others=[Slow(0.01)], max_steps=14).record
    store = RunStore(tmp_path / "runs.sqlite")
    for number in range(4):
        store.add(dataclasses.replace(first, run_id=f"again {number}"))
    callback = KptRunCallback(store, print_report=False, warmup_steps=2, **options)
    train(callback, others=[Slow(0.03)], max_steps=14)
    return callback


def test_a_run_that_is_slower_than_its_history_is_told(train, tmp_path):
    with pytest.warns(RegressionWarning, match="step_time"):
        callback = slower_at_last(train, tmp_path)
    assert callback.comparison.regressed
    assert callback.comparison.earlier == 5


def test_a_regression_fails_the_training_where_that_is_asked_for(train, tmp_path):
    with pytest.raises(RegressionError, match="step_time"):
        slower_at_last(train, tmp_path, on_regression="fail")
    assert len(RunStore(tmp_path / "runs.sqlite").all()) == 6, "it is stored before"


def test_a_regression_is_ignored_where_that_is_asked_for(train, tmp_path):
    assert slower_at_last(train, tmp_path, on_regression="ignore").comparison.regressed


def test_the_report_is_printed(train, tmp_path, capsys):
    train(KptRunCallback(tmp_path / "runs.sqlite"))
    assert "LlamaForCausalLM: 1 x" in capsys.readouterr().out


def test_a_loss_that_the_trainer_hides_because_it_is_no_number_is_found(train):
    model = tiny_model()
    model.model.embed_tokens.weight.data[5] = math.nan
    record = train(model=model, logging_steps=4).record
    assert (record.status, record.loss_finite) == ("finished", False)
    assert "a loss was not finite" in record.notes


@pytest.mark.parametrize(
    ("error", "status", "cause"),
    [
        (RuntimeError("secret"), "failed", "RuntimeError"),
        (torch.OutOfMemoryError("secret"), "failed", "out of memory"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ],
)
def test_a_run_that_died_is_stored_by_whoever_catches_its_exception(train, tmp_path, error, status, cause):
    with pytest.raises(type(error)) as caught:
        train(others=[Raises(error)])
    break_off_runs(caught.value)
    break_off_runs(caught.value)
    (record,) = RunStore(tmp_path / "runs.sqlite").all()
    assert (record.status, record.details["cause"], record.details["steps"]) == (status, cause, 6)
    assert "secret" not in str(record.to_dict())


def test_a_training_after_one_that_died_ends_the_record_of_that_one(train, tmp_path):
    callback = KptRunCallback(tmp_path / "runs.sqlite", print_report=False)
    with pytest.raises(RuntimeError):
        train(callback, others=[Raises(RuntimeError())])
    train(callback)
    assert [run.status for run in RunStore(tmp_path / "runs.sqlite").all()] == ["interrupted", "finished"]


@pytest.mark.parametrize("at", [4, 40])
def test_a_resumed_run_counts_from_where_it_was(train, tmp_path, at):
    """Saved within the first epoch of 32 steps, where the Trainer makes another loader, and in the second."""
    train(max_steps=at, save_strategy="steps", save_steps=at)
    record = train(max_steps=at + 10, resume=str(tmp_path / "out" / f"checkpoint-{at}")).record
    assert (record.details["first_step"], record.details["steps"]) == (at + 1, 10)


def test_nothing_of_the_loader_or_the_process_stays_changed(train):
    from accelerate.data_loader import DataLoaderShard

    seen = []

    class Last(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            seen.append(train_dataloader)

    train(others=[Last()], max_steps=3)
    assert type(seen[0]) is DataLoaderShard


def test_a_history_that_cannot_be_opened_stops_before_the_first_step(train, tmp_path):
    (tmp_path / "runs.sqlite").write_text("no database " * 100)
    with pytest.raises(HistoryError):
        train()


@pytest.mark.parametrize("options", [{"on_regression": "shout"}, {"fail_on": "bad"}])
def test_wrong_settings_are_refused(options):
    with pytest.raises(ConfigError):
        KptRunCallback(**options)


def test_report_to_kpt_is_known_while_registered_and_not_after(train, tmp_path):
    with register_integration(store=tmp_path / "named.sqlite", print_report=False):
        train(report_to=["kpt"], max_steps=4)
    assert len(RunStore(tmp_path / "named.sqlite").all()) == 1
    with pytest.raises(ValueError, match="kpt is not supported"):
        train(report_to=["kpt"], max_steps=4)


PROCESS = """
import sys
from kpt_lightning.huggingface.integration import register_integration
with register_integration(store=sys.argv[1], print_report=False, on_regression="fail"):
    assert "transformers" not in sys.modules, "a script without it must not wait for it"
    from tests.huggingface.test_tracking_callback import Raises, Tokens, tiny_model
    from transformers import Trainer, TrainingArguments
    from transformers.integrations import integration_utils
    assert "kpt" in integration_utils.INTEGRATION_TO_CALLBACK
    settings = TrainingArguments(
        output_dir=sys.argv[2], max_steps=9, use_cpu=True, report_to="kpt", disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=2,
    )
    Trainer(tiny_model(), settings, train_dataset=Tokens()).train()
    last = Trainer(tiny_model(), settings, train_dataset=Tokens(), callbacks=[Raises(ValueError("no"))])
assert "kpt" not in integration_utils.INTEGRATION_TO_CALLBACK
last.train()
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_leave_one_record_of_each_run_although_nobody_catches_an_exception(tmp_path):
    words = [sys.executable, "-c", PROCESS, tmp_path / "runs.sqlite", tmp_path / "out"]
    shared = {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            words, env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    for process in processes:
        assert "ValueError: no" in process.communicate(timeout=120)[1]
    finished, failed = RunStore(tmp_path / "runs.sqlite").all()
    assert (finished.status, finished.key.device_count, finished.key.strategy) == ("finished", 2, "ddp")
    assert (failed.status, failed.details["cause"], failed.details["steps"]) == ("failed", "ValueError", 6)
    assert failed.key == finished.key
