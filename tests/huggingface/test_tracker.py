import time

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import ProjectConfiguration
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.data import DataLoader, TensorDataset

from kpt_lightning.errors import ConfigError
from kpt_lightning.huggingface.integration import register_integration
from kpt_lightning.huggingface.tracked_run import break_off_runs
from kpt_lightning.huggingface.tracker import KptTracker, follow_trackers
from kpt_lightning.tracking.conclusion import RegressionError
from kpt_lightning.tracking.store import RunStore


@pytest.fixture
def tracker(tmp_path):
    return KptTracker(store=tmp_path / "runs.sqlite", print_report=False, warmup_steps=2)


class Loop:
    """A raw loop as people write it."""

    def __init__(self, tracker, *, follow=True, accumulate=1, config=None, project=None, log_with=None):
        self.tracker = tracker
        self.accelerator = Accelerator(
            cpu=True, log_with=log_with or tracker, gradient_accumulation_steps=accumulate, project_config=project
        )
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 1))
        data = TensorDataset(torch.ones(48, 6))
        prepared = self.accelerator.prepare(
            model, torch.optim.AdamW(model.parameters()), DataLoader(data, batch_size=4), DataLoader(data, batch_size=8)
        )
        self.model, self.optimizer, self.loader, self.evaluated = prepared
        self.accelerator.init_trackers("project", config=config)
        for _ in range(2 * follow):
            follow_trackers(self.accelerator)

    def run(self, seconds=0.0, *, at_step=None, stop=True):
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(batch[0]).square().mean()
                self.accelerator.backward(loss)
                time.sleep(seconds)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.accelerator.log({"loss": loss.detach(), "lr": 0.1}, step=7)
            if at_step is not None:
                at_step(self)
        if stop:
            self.accelerator.end_training()
        return self.tracker.record


def test_a_loop_is_measured_stored_and_readable(tracker, tmp_path):
    record = Loop(tracker, config={"lr": 0.1, "where": object()}).run(0.005)
    assert RunStore(tmp_path / "runs.sqlite").all() == [record]
    assert (record.status, record.details["first_step"], record.details["steps"]) == ("finished", 2, 11)
    assert record.details["config"] == {"batch": [4, 6], "batches_per_step": 1}
    assert record.metrics["step_time"].n == record.metrics["data_wait"].n == 9
    assert 0.005 <= record.metrics["step_time"].median < 0.05
    assert record.details["hyperparameters"] == {"lr": 0.1}
    assert record.details["logged"] == {"lr": 0.1}
    assert (record.key.name, record.key.strategy, record.key.precision) == ("Sequential", "single", "32")
    assert set(record.loss_at) == {1, 2, 5, 10}


def test_accumulated_gradients_are_one_step(tracker):
    record = Loop(tracker, accumulate=3).run(0.004)
    assert (record.details["steps"], record.details["config"]["batches_per_step"]) == (3, 3)
    assert record.metrics["step_time"].median >= 0.012


def test_an_evaluation_and_a_saved_state_are_no_training_time(tracker, tmp_path):
    def evaluate(loop):
        for _ in loop.evaluated:
            time.sleep(0.004)

    def save(loop):
        loop.accelerator.save_state(tmp_path / "state")
        time.sleep(0.02)

    record = Loop(tracker).run(at_step=lambda loop: (evaluate(loop), save(loop)))
    assert 4 / record.metrics["samples_per_second"].median < 0.02, "six batches of evaluation take 0.024 s"


def test_without_following_steps_are_timed_from_one_to_the_next(tracker):
    record = Loop(tracker, follow=False).run(0.005)
    assert (record.key.name, record.details["steps"]) == ("accelerate", 11)
    assert record.metrics["step_time"].median >= 0.005
    assert record.details["config"]["batch"] == "unknown"


def test_another_optimizer_is_not_counted(tracker):
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    record = Loop(tracker).run(at_step=lambda loop: other.step())
    assert record.details["steps"] == 11


@pytest.mark.parametrize("dies", [False, True])
def test_everything_is_as_before_at_the_end(tracker, dies):
    hooks = dict(_global_optimizer_post_hooks)
    loop = Loop(tracker)
    assert _global_optimizer_post_hooks != hooks
    loop.run(stop=not dies)
    if dies:
        break_off_runs(RuntimeError())
    assert _global_optimizer_post_hooks == hooks
    assert type(loop.loader) is type(loop.evaluated) is DataLoaderShard
    assert not loop.accelerator._save_model_state_pre_hook


def test_a_loss_that_is_no_number_is_kept(tracker):
    record = Loop(tracker).run(at_step=lambda loop: loop.accelerator.log({"train_loss": float("nan")}))
    assert record.loss_finite is False


def test_a_regression_fails_where_that_is_asked_for(tmp_path):
    def tracker():
        return KptTracker(store=tmp_path / "runs.sqlite", print_report=False, warmup_steps=2, on_regression="fail")

    for _ in range(5):
        Loop(tracker()).run(0.005)
    with pytest.raises(RegressionError, match="step_time"):
        Loop(tracker()).run(0.02)
    assert len(RunStore(tmp_path / "runs.sqlite").all()) == 6


def test_a_loop_that_died_is_stored_by_whoever_catches_its_exception(tracker, tmp_path):
    def die(loop):
        if tracker.tracker.recorder.steps == 8:
            raise MemoryError

    with pytest.raises(MemoryError) as caught:
        Loop(tracker).run(at_step=die)
    break_off_runs(caught.value)
    (record,) = RunStore(tmp_path / "runs.sqlite").all()
    assert (record.status, record.details["cause"], record.details["steps"]) == ("failed", "out of memory", 8)
    tracker.finish()
    assert len(RunStore(tmp_path / "runs.sqlite").all()) == 1


def test_the_name_kpt_is_known_while_registered_and_not_after(tmp_path):
    with register_integration(store=tmp_path / "runs.sqlite", print_report=False):
        loop = Loop(None, log_with="kpt", project=ProjectConfiguration(tmp_path))
        loop.tracker = loop.accelerator.get_tracker("kpt")
        loop.run()
    assert "kpt" not in LOGGER_TYPE_TO_CLASS
    (record,) = RunStore(tmp_path / "runs.sqlite").all()
    assert record.key.name == "project"


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError):
        KptTracker(on_regression="shout")
