"""Medians at the end and drifts on the way reach the Trainer's loggers, read back from what they wrote."""

import os

import pytest
from lightning.pytorch.loggers import CSVLogger

from kpt_lightning.tracking.drift import DriftWarning
from tests.callbacks.small_fits import Net, callback_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def test_a_step_that_gets_slower_is_told_while_training_and_kept_in_the_record(fit, tmp_path):
    logger = CSVLogger(tmp_path, name="log", version=0)
    module = Net(step_seconds=0.001, slow_from=300)
    with pytest.warns(DriftWarning, match="kpt: a step takes .* longer"):
        callback = fit(module, callback_for(tmp_path), rows=4 * 550, logger=logger)
    (drift,) = callback.record.details["drift"]
    assert drift["kind"] == "step_time"
    assert 250 <= drift["since_step"] <= 330
    assert drift["noticed_step"] < 550
    assert any(note.startswith("drift: a step takes") for note in callback.record.notes)
    header = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "kpt/drift/step_time" in header.split(",")


def test_metrics_reach_the_csv_logger_under_kpt(fit, tmp_path):
    logger = CSVLogger(tmp_path, name="log", version=0)
    fit(logger=logger, log_every_n_steps=1)
    header = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert {"kpt/step_time", "kpt/samples_per_second", "kpt/peak_memory"} <= set(header.split(","))


def test_metrics_reach_tensorboard(fit, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = fit(logger=TensorBoardLogger(tmp_path, name="log", version=0), log_every_n_steps=10).record
    events = EventAccumulator(str(tmp_path / "log" / "version_0")).Reload()
    (value,) = events.Scalars("kpt/step_time")
    assert value.step == 40
    assert value.value == pytest.approx(record.metrics["step_time"].median)


def test_metrics_reach_weights_and_biases_offline(fit, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from lightning.pytorch.loggers import WandbLogger

    for name, value in {"WANDB_SILENT": "true", "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="kpt")
    record = fit(logger=logger, log_every_n_steps=10).record
    assert logger.experiment.summary["kpt/step_time"] == pytest.approx(record.metrics["step_time"].median)
    logger.experiment.finish()
    # Its own server tells its place to the processes after it.
    os.environ.pop("WANDB_SERVICE", None)


def test_metrics_reach_an_mlflow_file_store(fit, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    # Refused without it since MLflow 3; its database would need seconds to be made.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("kpt", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    record = fit(logger=logger, log_every_n_steps=10).record
    metrics = mlflow.tracking.MlflowClient(f"file:{tmp_path / 'mlruns'}").get_run(logger.run_id).data.metrics
    assert metrics["kpt/step_time"] == pytest.approx(record.metrics["step_time"].median)
