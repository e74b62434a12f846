import time

import pytest
import torch
from torch import nn

from kpt_lightning.errors import ConfigError
from kpt_lightning.measure.memory import PeakMemory
from kpt_lightning.measure.timer import StepTimes
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.recorder import RunInfo, RunRecorder
from kpt_lightning.tracking.series import Work
from kpt_lightning.tracking.summary import common_shape, peak_dtype

BATCH = torch.zeros(4, 8)


def train(recorder, batches, *, done=lambda index: True, loss=1.0, sleep=0.0):
    """A loop without a trainer: nothing but the recorder's public calls."""
    recorder.start()
    for index, batch in enumerate(recorder.batches(batches)):
        recorder.batch_start(batch)
        time.sleep(sleep)
        recorder.batch_end(loss, done=done(index))
    recorder.stop()
    return recorder.finish()


def make(**options):
    return RunRecorder(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2)), RunInfo(name="loop"), **options)


def test_a_plain_loop_gets_a_record_that_survives_json():
    record = train(make(), [BATCH] * 40)
    assert record.metrics["step_time"].n == 30
    assert record.metrics["data_wait"].n == 30
    assert record.metrics["samples_per_second"].unit == "samples/s"
    assert record.metrics["final_loss"].median == 1.0
    assert record.loss_at == {1: 1.0, 2: 1.0, 5: 1.0, 10: 1.0, 20: 1.0}
    assert record.loss_finite is True
    assert record.details["config"] == {"batch": [4, 8], "batches_per_step": 1}
    assert RunRecord.from_dict(record.to_dict()) == record


def test_step_time_is_what_the_step_took():
    record = train(make(), [BATCH] * 9, sleep=0.01)
    assert record.metrics["step_time"].median >= 0.01
    assert record.metrics["samples_per_second"].median <= 4 / 0.01
    assert record.notes[0] == "warm-up shrunk from 10 to 3 steps: the run was short"


def test_accumulation_counts_the_work_of_all_batches():
    tokens = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    record = train(make(warmup_steps=1), [tokens] * 12, done=lambda index: index % 3 == 2, sleep=0.002)
    assert record.metrics["step_time"].n == 3
    assert record.metrics["step_time"].median >= 0.006
    assert record.details["config"]["batches_per_step"] == 3
    per_second = record.metrics["tokens_per_second"].median
    assert per_second <= 3 * 16 / record.metrics["step_time"].median


def test_flops_of_an_mlp_follow_the_batch():
    # 4 rows, two layers of 8 x 16 and 16 x 2, forward 2KN, weight gradient 2KN, input gradient of the second only
    assert train(make(), [BATCH] * 4).details["flops"]["per_step"] == 4 * 2 * (128 * 2 + 32 * 3)


def test_given_flops_win():
    assert train(make(flops_per_step=123.0), [BATCH] * 4).details["flops"]["per_step"] == 123.0


@pytest.mark.parametrize("given", [7, lambda batch: batch.shape[0] + 3], ids=["number", "function"])
def test_given_tokens_win(given):
    record = train(make(tokens_per_batch=given, warmup_steps=0), [BATCH] * 4, sleep=0.001)
    rate = record.metrics["tokens_per_second"].median
    assert 0 < rate <= 7 / 0.001


def test_a_run_without_a_step_has_no_record():
    assert train(make(), []) is None
    assert train(make(), [BATCH] * 3, done=lambda index: False) is None


def test_a_loss_that_is_not_finite_is_recorded_and_json_stays_valid():
    record = train(make(), [BATCH] * 4, loss=float("nan"))
    assert record.loss_finite is False
    assert "final_loss" not in record.metrics
    assert record.loss_at == {}
    assert "a loss was not finite" in record.notes


def test_the_key_changes_with_what_the_user_adds_and_with_the_batch():
    def key(batch, **config):
        recorder = RunRecorder(nn.Linear(8, 2), RunInfo(name="loop", config=config))
        return train(recorder, [batch] * 3).key

    assert key(BATCH) == key(BATCH)
    assert key(BATCH).digest != key(BATCH, lr=1).digest
    assert key(BATCH).digest != key(torch.zeros(2, 8)).digest


def test_varying_shapes_give_one_key():
    def shapes(lengths):
        return [StepTimes(0.1, 0.0, None, Work(index=1, shape=(4, length))) for length in lengths]

    assert common_shape(shapes([7, 9, 11, 13])) == common_shape(shapes([8, 20, 3])) == "varying, 4 rows"
    assert common_shape(shapes([16, 16, 16, 5])) == [4, 16]


@pytest.mark.parametrize("config", [{"a": object()}, {"a": float("nan")}])
def test_a_config_that_cannot_be_stored_is_refused_before_training(config):
    with pytest.raises(ConfigError, match="config"):
        RunRecorder(nn.Linear(2, 2), RunInfo(name="loop", config=config))


def test_negative_warmup_is_refused():
    with pytest.raises(ConfigError, match="warmup_steps"):
        make(warmup_steps=-1)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", "float32"),
        ("bf16-mixed", "bfloat16"),
        ("16-mixed", "float16"),
        ("fp8", "float8"),
        ("fp8-rowwise-bf16", "float8"),
        ("transformer-engine", "float8"),
        ("64-true", None),
    ],
)
def test_the_peak_is_that_of_the_precision_in_use(precision, dtype):
    assert peak_dtype(precision, "cpu") == dtype


def test_tf32_counts_as_tf32_on_cuda_only():
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_dtype("32-true", "cuda") == "tf32"
        assert peak_dtype("32-true", "cpu") == "float32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_cpu_memory_is_recorded_with_its_source():
    record = train(make(), [BATCH] * 4)
    assert record.metrics["peak_memory"].median > 1e6
    assert "since the process started" in record.details["memory"]
    assert PeakMemory(1, None, "").reserved_bytes is None


@pytest.mark.cuda
def test_cuda_steps_add_no_synchronisation():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).cuda()
    recorder = RunRecorder(model, RunInfo(name="loop"), device="cuda")
    batch = torch.randn(256, 1024, device="cuda")
    recorder.start()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(200):  # more than one window of losses
            recorder.batch_start(batch)
            loss = model(batch).square().mean()
            loss.backward()
            recorder.batch_end(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    recorder.stop()
    record = recorder.finish()
    assert record.details["clock"] == "cuda_events"
    assert record.metrics["step_time"].n == 190
    assert record.loss_finite is True
    assert 0 < record.metrics["mfu"].median < 1
    assert record.metrics["peak_memory"].median < record.metrics["reserved_memory"].median + 1
