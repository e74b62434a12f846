from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.errors import ConfigError
from kpt_lightning.measure.micro_batch import largest_batch, repeat_rows


def out_of_memory_above(rows: int, error: BaseException) -> Any:
    seen: list[int] = []

    def run(batch: dict[str, Tensor]) -> None:
        seen.append(batch["x"].shape[0])
        if seen[-1] > rows:
            raise error

    return run, seen


HOST_ERROR = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), RuntimeError(HOST_ERROR), MemoryError()], ids=str)
def test_sizes_double_until_memory_is_at_an_end(error: BaseException) -> None:
    run, seen = out_of_memory_above(20, error)
    points = largest_batch(run, {"x": torch.zeros(3, 2)}, 1000, device="cpu")
    assert [point.size for point in points] == [3, 6, 12]
    assert seen == [3] * 4 + [6] * 4 + [12] * 4 + [24]
    assert all(point.samples_per_second > 0 and point.peak_bytes > 0 for point in points)


def test_the_limit_is_the_end_as_well_and_time_is() -> None:
    run, _ = out_of_memory_above(10**9, MemoryError())
    assert [point.size for point in largest_batch(run, {"x": torch.zeros(2)}, 9, device="cpu")] == [2, 4, 8]
    assert largest_batch(run, {"x": torch.zeros(2)}, 9, device="cpu", max_seconds=0.0) == []


def test_another_error_is_not_taken_for_the_end_of_memory() -> None:
    run, _ = out_of_memory_above(2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        largest_batch(run, {"x": torch.zeros(2)}, 8, device="cpu")


@pytest.mark.parametrize("batch", [{"x": torch.zeros(0, 2)}, {}, [3], {"x": torch.zeros(16)}], ids=str)
def test_a_batch_without_rows_or_above_the_limit_is_refused(batch: Any) -> None:
    with pytest.raises(ConfigError, match="the batch has"):
        largest_batch(lambda _: None, batch, 8, device="cpu")


def test_rows_are_repeated_in_every_tensor_that_has_them_and_nowhere_else() -> None:
    ids, mask = torch.arange(6).view(2, 3), torch.ones(3, 3)
    for batch in ({"ids": ids, "mask": mask, "name": "a"}, UserDict(ids=ids, mask=mask, name="a")):
        larger = repeat_rows(batch, 2, 3)
        assert torch.equal(larger["ids"], torch.cat([ids] * 3))
        assert larger["mask"] is mask
        assert larger["name"] == "a"
    pair = repeat_rows((ids, [ids.float()]), 2, 2)
    assert (pair[0].shape, pair[1][0].shape) == ((4, 3), (4, 3))


def test_a_real_model_is_run_at_each_size() -> None:
    model = nn.Linear(4, 4)

    def run(batch: tuple[Tensor]) -> None:
        model(batch[0]).sum().backward()
        model.zero_grad()

    points = largest_batch(run, (torch.randn(8, 4),), 32, device="cpu")
    assert [point.size for point in points] == [8, 16, 32]


@pytest.mark.cuda
def test_on_cuda_the_real_end_of_memory_is_found_and_the_device_goes_on() -> None:
    total = torch.cuda.mem_get_info()[1]

    def run(batch: Tensor) -> None:
        torch.empty(batch.shape[0] * total // 8, dtype=torch.uint8, device="cuda")

    points = largest_batch(run, torch.zeros(1, 1, device="cuda"), 64, device="cuda")
    assert [point.size for point in points] == [1, 2, 4]
    assert points[-1].peak_bytes >= total // 2
    assert float(torch.ones(2, device="cuda").sum()) == 2.0
