import time

import pytest
import torch

from kpt_lightning.measure import timer as timer_module
from kpt_lightning.measure.timer import StepTimer


def batch(timer, *, step_done=True, work=0.002, context=None):
    timer.batch_start()
    time.sleep(work)
    timer.batch_end(step_done=step_done, context=context)


def test_each_step_has_its_compute_gap_and_wait():
    timer = StepTimer()
    for index in range(3):
        timer.fetch_start()
        time.sleep(0.003)
        timer.fetch_end()
        batch(timer, context=index)
    steps = timer.finish()
    assert [step.context for step in steps] == [0, 1, 2]
    assert steps[0].gaps == 0.0
    for step in steps[1:]:
        assert step.compute >= 0.002
        assert step.gaps >= step.data_wait >= 0.003
        assert step.period == step.compute + step.gaps


def test_accumulated_batches_are_one_step():
    timer = StepTimer()
    for index in range(6):
        batch(timer, step_done=index % 3 == 2)
    steps = timer.finish()
    assert len(steps) == 2
    assert all(step.compute >= 0.006 for step in steps)


def test_a_pause_between_steps_is_left_out_of_the_gap():
    timer = StepTimer()
    batch(timer)
    timer.pause()
    time.sleep(0.05)
    batch(timer)
    batch(timer)
    steps = timer.finish()
    assert steps[1].gaps == 0.0
    assert steps[2].gaps > 0.0


def test_a_pause_inside_a_step_leaves_that_step_out():
    timer = StepTimer()
    batch(timer, context="before")
    timer.batch_start()
    timer.pause()
    timer.batch_end(context="spoiled")
    batch(timer, context="after")
    assert [step.context for step in timer.finish()] == ["before", "after"]


def test_a_batch_that_never_ended_is_forgotten():
    timer = StepTimer()
    timer.batch_start()
    batch(timer)
    timer.batch_end()
    assert len(timer.finish()) == 1


def test_no_fetch_reported_means_no_data_wait():
    timer = StepTimer()
    batch(timer)
    assert timer.finish()[0].data_wait is None


def test_clock_is_named():
    assert StepTimer("cpu").clock == "host"
    assert StepTimer("cuda").clock == "cuda_events"


@pytest.mark.cuda
def test_cuda_steps_are_device_time_and_never_synchronise():
    size = torch.randn(4096, 4096, device="cuda")
    timer = StepTimer("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            timer.batch_start()
            for _ in range(5):
                size @ size
            timer.batch_end()
        early = timer.drain()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steps = early + timer.finish()
    assert len(steps) == 20
    floor = 5 * 2 * 4096**3 / 1e15  # no device reaches 1 PFLOP/s in fp32
    assert all(step.compute > floor for step in steps)
    assert timer.dropped == 0


@pytest.mark.cuda
def test_cuda_events_are_reused_and_a_full_ring_drops_the_oldest(monkeypatch):
    monkeypatch.setattr(timer_module, "RING_SLOTS", 4)
    timer = StepTimer("cuda")
    for index in range(10):
        timer.batch_start()
        timer.batch_end(context=index)
    assert timer.dropped == 6
    assert [step.context for step in timer.finish()] == [6, 7, 8, 9]
    for _ in range(50):
        timer.batch_start()
        timer.batch_end()
        torch.cuda.synchronize()
        timer.drain()
    assert len(timer._events) <= 12
