import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.candidates.compiled_call import compiled_call
from kpt_lightning.candidates.inductor import Inductor

# torch's advice while it compiles for a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def mlp(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [each.grad for each in model.parameters()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_layer_frozen_or_unfrozen_later_has_the_gradients_of_the_plain_model(device: str, frozen_first: bool) -> None:
    model = mlp(device)
    plain, x = copy.deepcopy(model), torch.randn(4, 8, device=device)
    model._compiled_call_impl = compiled_call(model, Inductor("unfreeze"))
    for frozen in (frozen_first, not frozen_first, frozen_first):
        for each in (plain, model):
            each[0].requires_grad_(not frozen)
        for one, other in zip(gradients(plain, x), gradients(model, x), strict=True):
            assert (one is None) is (other is None)
            if one is not None:
                torch.testing.assert_close(other, one)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_blocks_of_one_class_share_a_graph_and_a_class_of_torch_is_really_compiled() -> None:
    blocks = [mlp("cpu") for _ in range(3)]
    x = torch.randn(4, 8)
    for block in blocks:
        torch.testing.assert_close(compiled_call(block, Inductor("shared"))(x), block(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_keyword_of_any_name_reaches_the_module() -> None:
    class Named(nn.Module):
        def forward(self, *, trained: Tensor) -> Tensor:
            return trained + 1

    assert compiled_call(Named(), Inductor("named"))(trained=torch.zeros(2)).tolist() == [1.0, 1.0]
