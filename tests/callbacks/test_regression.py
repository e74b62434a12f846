import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from kpt_lightning.callbacks import RegressionCallback
from kpt_lightning.errors import ConfigError, HistoryError
from kpt_lightning.tracking.store import RunStore
from tests.callbacks.small_fits import Manual, Net, Rows, Stream, Validated, callback_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def test_a_fit_is_measured_stored_and_readable(fit, tmp_path):
    callback = fit()
    record = callback.record
    assert RunStore(tmp_path / "runs.sqlite").all() == [record]
    assert callback.comparison is None
    assert record.status == "finished"
    assert record.details["steps"] == 40
    assert record.metrics["step_time"].n == 30
    assert record.metrics["data_wait"].n == 30
    assert record.key.name == "Net"
    assert (record.key.strategy, record.key.precision, record.key.device_count) == (
        "SingleDeviceStrategy",
        "32-true",
        1,
    )
    assert record.loss_finite is True


def test_checkpoints_have_a_stall_and_compiled_models_a_compile_time(fit, tmp_path):
    torch._dynamo.reset()
    module = Net()
    module.layers = torch.compile(module.layers, backend="eager")
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=10)
    metrics = fit(module, callbacks=[saver], enable_checkpointing=True).record.metrics
    assert metrics["checkpoint_stall"].n >= 3
    assert 0 < metrics["checkpoint_stall"].median < 10
    assert metrics["compile_time"].median > 0
    assert metrics["compiled_graphs"].median >= 1
    assert metrics["recompiles"].median < metrics["compiled_graphs"].median


def test_without_checkpoints_and_compilation_neither_is_a_metric(fit):
    assert not {"checkpoint_stall", "compile_time", "recompiles"} & fit().record.metrics.keys()


def test_a_slow_loader_shows_in_data_wait_and_throughput_and_not_in_step_time(fit):
    data = DataLoader(Rows(60, delay=0.003), batch_size=4)
    record = fit(data=data).record
    assert record.metrics["data_wait"].median >= 0.012
    assert record.metrics["samples_per_second"].median <= 4 / 0.012
    assert record.metrics["step_time"].median < 0.5 * record.metrics["data_wait"].median + 0.01


@pytest.mark.parametrize("kind", ["sized", "stream"])
def test_the_loader_is_timed_whether_it_is_sized_or_not(fit, kind):
    data = DataLoader(Stream() if kind == "stream" else Rows(160), batch_size=4)
    callback = fit(data=data)
    assert callback.record.metrics["data_wait"].n == callback.record.metrics["step_time"].n


def test_validation_and_checkpoints_are_no_training_time(fit, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1)
    record = fit(
        Validated(),
        val=DataLoader(Rows(8), batch_size=4),
        callbacks=[saver],
        val_check_interval=1,
        enable_checkpointing=True,
        rows=60,
    ).record
    assert record.metrics["samples_per_second"].median > 4 / (record.metrics["step_time"].median + 0.04)


def test_accumulated_batches_are_one_step_with_the_loss_before_lightnings_division(fit):
    plain = fit().record
    record = fit(accumulate_grad_batches=4).record
    assert record.details["steps"] == 10
    assert record.details["config"]["batches_per_step"] == 4
    assert record.key.config != plain.key.config
    first_batches = (plain.loss_at[1] + plain.loss_at[2] + 2 * plain.loss_at[5]) / 4
    assert record.loss_at[1] == pytest.approx(first_batches, rel=0.5)


@pytest.mark.parametrize(("every", "steps", "batches"), [(1, 40, 1), (4, 10, 4)])
def test_manual_optimization_with_two_optimizers_counts_steps_and_not_optimizers(fit, every, steps, batches):
    record = fit(Manual(every)).record
    assert record.details["steps"] == steps
    assert record.details["config"]["batches_per_step"] == batches
    assert record.loss_finite is True


def test_a_single_step_has_a_record_that_says_so(fit):
    record = fit(max_steps=1, max_epochs=-1).record
    assert record.metrics["step_time"].n == 1
    assert any("shrunk from 10 to 0" in note for note in record.notes)


def test_one_batch_per_epoch_is_measured(fit):
    record = fit(limit_train_batches=1, max_epochs=6).record
    assert record.details["steps"] == 6


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_steps": 0}])
def test_a_fit_without_steps_says_so_and_stores_nothing(fit, tmp_path, options):
    with pytest.warns(UserWarning, match="no optimizer step ran"):
        callback = fit(**options)
    assert callback.record is None
    assert RunStore(tmp_path / "runs.sqlite").all() == []


def test_a_rehearsal_is_not_recorded(fit, tmp_path):
    assert fit(fast_dev_run=2).record is None
    assert RunStore(tmp_path / "runs.sqlite").all() == []


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [(RuntimeError("boom"), RuntimeError, "failed"), (KeyboardInterrupt(), SystemExit, "interrupted")],
)
def test_an_exception_reaches_the_user_and_the_run_is_never_a_baseline(fit, tmp_path, error, raised, status):
    with pytest.raises(raised):
        fit(Net(fail_at=20, error=error))
    store = RunStore(tmp_path / "runs.sqlite")
    (record,) = store.all()
    assert record.status == status
    assert record.loss_finite is None
    assert fit().comparison is None


def test_a_store_that_breaks_during_a_failing_fit_does_not_hide_the_users_exception(fit, tmp_path, caplog):
    class Break(pl.Callback):
        def on_train_batch_end(self, *_):
            (tmp_path / "runs.sqlite").write_bytes(b"broken" * 1000)

    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="boom"):
        fit(Net(fail_at=20), callbacks=[Break()])
    assert "has no record" in caplog.text


def test_a_store_that_breaks_during_training_is_a_warning_after_it(fit, tmp_path):
    class Break(pl.Callback):
        def on_train_batch_end(self, *_):
            (tmp_path / "runs.sqlite").write_bytes(b"broken" * 1000)

    with pytest.warns(UserWarning, match="was not stored"):
        callback = fit(callbacks=[Break()])
    assert callback.record.status == "finished"


def test_an_unreadable_store_stops_the_fit_before_it_starts(fit, tmp_path):
    (tmp_path / "runs.sqlite").write_bytes(b"not a database" * 100)
    module = Net()
    with pytest.raises(HistoryError, match="KPT_HISTORY"):
        fit(module)
    assert module.global_step == 0


def test_the_state_survives_a_checkpoint_loaded_with_weights_only_and_a_resumed_run_is_measured(fit, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    first = fit(callbacks=[saver], enable_checkpointing=True).record
    path = tmp_path / "saved" / "last.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["kpt_lightning.RegressionCallback"]
    assert state["version"] == 1
    again = ModelCheckpoint(tmp_path / "saved", save_last=True)
    resumed = fit(ckpt_path=path, max_epochs=2, callbacks=[again], enable_checkpointing=True).record
    assert resumed.details["steps"] == 40
    assert resumed.details["first_step"] == 41
    assert resumed.details["resumed_from"] == state["run_id"] == first.run_id
    assert set(resumed.loss_at) == {50}
    assert resumed.key == first.key


def test_the_report_says_that_the_first_run_has_nothing_to_compare_with(fit, tmp_path, capsys):
    fit(callback=RegressionCallback(tmp_path / "runs.sqlite", on_regression="ignore"))
    assert "first run of this key: nothing to compare with" in capsys.readouterr().out
    fit(callback=RegressionCallback(tmp_path / "runs.sqlite", on_regression="ignore"))
    out = capsys.readouterr().out
    assert "verdict" in out
    assert "step time" in out


def test_names_and_configs_separate_histories(fit, tmp_path):
    fit()
    assert fit(callback=callback_for(tmp_path, name="other")).comparison is None
    assert fit(callback=callback_for(tmp_path, config={"lr": 1})).comparison is None


def test_the_profiler_gets_its_own_methods_back_also_after_an_exception(fit):
    for module in (Net(), Net(fail_at=3)):
        profiler = SimpleProfiler()
        try:
            fit(module, profiler=profiler)
        except RuntimeError:
            assert module.fail_at == 3
        assert not {"start", "stop"} & vars(profiler).keys()
        assert any(name.endswith("train_dataloader_next") for name in profiler.recorded_durations)


def test_a_plan_of_the_strategy_is_stored(fit):
    class Plan:
        def to_dict(self):
            return {"precision": "fp8", "steps": ["compile"]}

    class Planned(SingleDeviceStrategy):
        plan = Plan()

    assert fit(strategy=Planned("cpu")).record.plan == Plan().to_dict()


@pytest.mark.parametrize("options", [{"on_regression": "explode"}, {"warmup_steps": -1}, {"fail_on": "bad"}])
def test_a_wrong_setting_is_refused_at_once(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        RegressionCallback(**options)


def test_making_one_opens_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KPT_HISTORY", raising=False)
    RegressionCallback()
    assert list(tmp_path.iterdir()) == []
