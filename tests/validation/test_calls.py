"""What is recorded of each module's call, and what a recording leaves behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM

from kpt_lightning.validation.calls import ModuleCall, TensorSpec, record_calls

CPU = torch.device("cpu")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, *, mask: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return {"out": self.linear(x) * scale * mask, "tokens": mask.sum(), "note": "n"}


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused = Inner(), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.tensor([1, 0])
        first = self.inner(x, mask=mask)["out"]
        mask.zero_()
        second: Tensor = self.inner(x * 2, mask=mask, scale=3.0)["out"]
        return first + second


def recorded(model: nn.Module, *args: Any) -> dict[str, ModuleCall]:
    return record_calls(model, lambda: model(*args))


def test_the_first_call_of_each_module_is_described_and_all_are_counted() -> None:
    calls = recorded(Outer(), torch.ones(3, 4))
    assert set(calls) == {"", "inner", "inner.linear"}
    inner = calls["inner"]
    assert inner.args == (TensorSpec((3, 4), torch.float32, CPU, False),)
    assert inner.kwargs["mask"].tolist() == [1, 0]
    assert set(inner.kwargs) == {"mask"}
    assert inner.output["out"] == TensorSpec((3, 2), torch.float32, CPU, True)
    assert inner.output["tokens"] == TensorSpec((), torch.int64, CPU, False)
    assert inner.output["note"] == "n"
    assert (inner.count, calls["inner.linear"].count, calls[""].count) == (2, 2, 1)


def test_a_shared_module_is_recorded_under_its_first_name() -> None:
    shared = nn.Linear(2, 2)
    calls = recorded(nn.Sequential(shared, shared), torch.ones(1, 2))
    assert set(calls) == {"", "0"}
    assert calls["0"].count == 2


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_autocast_and_mode_are_recorded(dtype: torch.dtype | None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        calls = recorded(model, torch.ones(1, 2))
    assert calls["0"].autocast is dtype
    assert calls["0"].output.dtype is (dtype or torch.float32)
    assert calls["0"].training
    assert not calls["1"].training


def test_no_activation_is_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    calls = recorded(model, torch.ones(1, 2))
    found: list[Any] = []
    torch.utils._pytree.tree_map(found.append, [(c.args, c.kwargs, c.output) for c in calls.values()])
    assert found
    assert not any(isinstance(each, Tensor) for each in found)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_also_after_an_error(error: type[BaseException]) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    model = nn.Sequential(nn.Linear(2, 2), Fails())
    with pytest.raises(error):
        recorded(model, torch.ones(1, 2))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_transformers_model_is_recorded_by_the_names_of_its_modules() -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    calls = record_calls(model, lambda: model(input_ids=torch.arange(4)[None]))
    names = dict(model.named_modules())
    # The two lists of modules are never called.
    assert names.keys() - calls.keys() == {"model.layers"}
    assert calls["model.layers.1.mlp"].args[0].shape == (1, 4, 16)
    assert calls["model.embed_tokens"].args[0].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("ran_before", [True, False])
def test_recording_sees_into_what_the_user_compiled_and_is_no_part_of_it(whole: bool, ran_before: bool) -> None:
    torch._dynamo.reset()
    plain = nn.Sequential(Two(), nn.Linear(2, 2))
    counter, x = CompileCounter(), torch.ones(1, 2)
    if whole:
        model: Any = torch.compile(plain, backend=counter)
    else:
        model = plain
        plain[0].compile(backend=counter)
    if ran_before:
        model(x)
    calls = record_calls(model, lambda: model(x))
    model(x)
    inside = {"0", "0.first", "0.second", "1"}
    assert set(calls) == ({"", "_orig_mod", *(f"_orig_mod.{name}" for name in inside)} if whole else {"", *inside})
    # Neither compiled with hooks in it, nor a second time without them.
    assert counter.frame_count == 1
