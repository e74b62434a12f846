"""Contract of the one private point of torch that a run's compilations are read from."""

import pytest
import torch

from kpt_lightning.tracking.compilation import CompilationWatch


@pytest.mark.parametrize("earlier", [0, 3])
def test_compilations_and_recompilations_of_a_run_are_counted_with_their_time(earlier):
    for dtype in (torch.float16, torch.float32, torch.float64)[:earlier]:
        # Another function's, whose numbers dynamo gives again after the reset.
        torch.compile(lambda x: x - 1, backend="eager")(torch.ones(2, dtype=dtype))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")
    compiled(torch.ones(2))
    watch = CompilationWatch()
    compiled(torch.ones(2))
    assert watch.read() is None
    compiled(torch.ones(2, dtype=torch.float64))
    compiled(torch.ones(2, dtype=torch.int32))
    found = watch.read()
    assert (found.graphs, found.recompiles) == (2, 2)
    assert 0 < found.seconds < 60
