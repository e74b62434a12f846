"""Which modules may get a hook, and running compiled code as Python."""

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from kpt_lightning.validation.compiled import outside_compiled, run_uncompiled


def net() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in outside_compiled(model)]


def test_all_modules_of_a_model_that_nobody_compiled() -> None:
    model = net()
    assert names(model) == [name for name, _ in model.named_modules()]


def test_a_module_compiled_in_place_is_left_out_with_its_children() -> None:
    model = net()
    model[0].compile()
    assert names(model) == ["", "1"]


def test_the_shell_of_a_compiled_module_is_outside_and_its_inside_is_not() -> None:
    model = nn.Sequential(torch.compile(net()), nn.Linear(2, 2))
    assert names(model) == ["", "0", "1"]
    assert names(torch.compile(net())) == [""]  # type: ignore[arg-type]


def test_a_module_in_two_places_is_left_out_where_one_of_them_is_compiled() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared), shared)
    model[0].compile()
    assert names(model) == [""]


def test_compiled_code_is_kept_while_it_runs_as_python() -> None:
    torch._dynamo.reset()
    model, counter, calls = net(), CompileCounter(), []
    run = torch.compile(model, backend=counter)
    x = torch.ones(1, 2)
    run(x)
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    with run_uncompiled():
        run(x)
    handle.remove()
    run(x)
    assert calls == [1]
    assert counter.frame_count == 1
