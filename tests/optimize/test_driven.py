"""A driven model runs in the plan's contexts and is in every other way the user's own object."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from kpt_lightning.candidates.autocast_bf16 import CANDIDATE
from kpt_lightning.candidates.class_swap import swap_all, swap_back
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.errors import KptError
from kpt_lightning.hardware import detect
from kpt_lightning.optimize.driven import drive


class Net(nn.Module):
    """A model of a user's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, torch.is_autocast_enabled("cpu")))
        return self.linear(x)  # type: ignore[no-any-return]


class Careful(Net):
    """With copying and pickling of its own, as Lightning's and others have."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "seen": ["not carried"]}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Careful":
        made = type(self).__new__(type(self))
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        made.copied = True  # type: ignore[assignment]
        return made


def subject(model: nn.Module) -> Subject:
    return Subject(model=model, profile=detect(), config=KptConfig(), device=torch.device("cpu"))


@dataclass
class Driven:
    """A driven model with what drives it."""

    model: Any
    subject: Subject
    undo: Callable[[], None]
    open: int = 0
    calls: int = 0

    @contextmanager
    def context(self) -> Iterator[None]:
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1


def driven(model: nn.Module, *, bf16: bool = False) -> Driven:
    known = subject(model)
    made = Driven(model, known, lambda: None)
    known.contexts.append(made.context)
    if bf16:
        CANDIDATE.apply(known, {})
        known.applied.append("autocast_bf16")

    def before() -> None:
        assert made.open == 0
        made.calls += 1

    made.undo = drive(model, known, before)
    return made


X = torch.ones(2, 4)


def test_it_is_the_same_object_of_a_class_of_the_same_name() -> None:
    model = Net()
    keys, parameters, attributes = list(model.state_dict()), list(model.parameters()), set(vars(model))
    made = driven(model)
    assert isinstance(model, Net)
    kind = type(model)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == (Net.__name__, Net.__qualname__, Net.__module__)
    assert kind.__doc__ == Net.__doc__
    assert repr(model) == repr(Net())
    assert list(model.state_dict()) == keys
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    made.undo()
    assert type(model) is Net
    assert set(vars(model)) == attributes


def test_contexts_are_entered_around_every_call_in_train_and_eval_mode() -> None:
    made = driven(Net(), bf16=True)
    made.model(X)
    with torch.no_grad():
        made.model.eval()(x=X)
    assert made.model.seen == [(True, True), (False, True)]
    assert (made.calls, made.open) == (2, 0)
    made.undo()
    made.model(X)
    assert made.model.seen[-1] == (False, False)
    assert made.calls == 2


def test_a_call_can_be_made_by_another_and_compiled_code_goes_past_it() -> None:
    torch._dynamo.reset()
    model, runs = Net(), []

    def around(run: Callable[[], Any]) -> Any:
        runs.append(run)
        return 2 * run()

    plain = model(X)
    undo = drive(model, subject(model), None, around)
    assert torch.equal(model(X), 2 * plain)
    compiled = torch.compile(model, backend="eager")
    before = len(runs)
    compiled(X)
    assert len(runs) <= before + 1
    undo()
    assert torch.equal(model(X), plain)


def test_hooks_of_the_users_run_inside() -> None:
    made = driven(Net())
    opened = []
    made.model.register_forward_pre_hook(lambda *_: opened.append(made.open))
    made.model.register_forward_hook(lambda *_: opened.append(made.open))
    made.model(X)
    assert opened == [1, 1]


def test_outputs_of_autocast_come_back_in_fp32_and_others_as_they_are() -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": (self.linear(x), [x.half()]), "tokens": torch.arange(2), "n": 3, "none": None}

    plain, low = driven(Outputs()).model(X), driven(Outputs(), bf16=True).model(X)
    assert plain["logits"][1][0].dtype is torch.float16
    assert low["logits"][0].dtype is low["logits"][1][0].dtype is torch.float32
    assert (low["tokens"].dtype, low["n"], low["none"]) == (torch.int64, 3, None)
    low["logits"][0].sum().backward()


def test_a_transformers_output_keeps_its_class() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    tokens = torch.arange(8)[None]
    plain = model(input_ids=tokens, labels=tokens)
    found = driven(model, bf16=True).model(input_ids=tokens, labels=tokens)
    assert type(found) is type(plain)
    assert found.loss.dtype is found.logits.dtype is torch.float32
    assert found.loss.item() == pytest.approx(plain.loss.item(), rel=0.02)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_model_leaves_no_context_open(error: type[BaseException]) -> None:
    class Fails(nn.Module):
        def forward(self) -> None:
            assert torch.is_autocast_enabled("cpu")
            raise error

    made = driven(Fails(), bf16=True)
    for _ in range(2):
        with pytest.raises(error):
            made.model()
    assert made.open == 0
    assert not torch.is_autocast_enabled("cpu")


def test_a_context_that_cannot_be_entered_leaves_those_before_it_closed() -> None:
    made = driven(Net(), bf16=True)

    def refuses() -> Any:
        raise RuntimeError("not here")

    made.subject.contexts.append(refuses)
    with pytest.raises(RuntimeError, match="not here"):
        made.model(X)
    assert made.open == 0
    assert not torch.is_autocast_enabled("cpu")


def test_a_model_may_call_itself() -> None:
    class Recursive(Net):
        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            assert made.open == 3 - depth
            return self(x, depth - 1) if depth else super().forward(x)  # type: ignore[no-any-return]

    model = Recursive()
    known = subject(model)
    made = Driven(model, known, lambda: None)
    known.contexts.append(made.context)
    made.undo = drive(model, known)
    model(X)
    assert made.open == 0


def test_a_driven_model_is_not_driven_twice() -> None:
    made = driven(Net())
    with pytest.raises(KptError, match="Net is driven already"):
        drive(made.model, made.subject)
    made.model(X)
    made.undo()
    undo = drive(made.model, made.subject)
    made.model(X)
    undo()
    assert type(made.model) is Net


def test_a_driven_part_of_a_driven_model_has_contexts_of_its_own() -> None:
    inner = driven(Net())
    outer = driven(nn.Sequential(inner.model, nn.Linear(4, 4)))
    outer.model(X)
    assert (inner.calls, outer.calls) == (1, 1)
    outer.undo()
    outer.model(X)
    assert (inner.calls, outer.calls) == (2, 1)


@pytest.mark.parametrize("kind", [Net, Careful])
def test_a_copy_is_undriven_and_shares_nothing(kind: type[Net]) -> None:
    made = driven(kind())
    found = copy.deepcopy(made.model)
    assert type(found) is kind
    assert set(vars(found)) - {"copied"} == set(vars(kind()))
    assert getattr(found, "copied", False) is (kind is Careful)
    found(X)
    assert made.calls == 0
    assert found.linear.weight is not made.model.linear.weight
    assert torch.equal(found.linear.weight, made.model.linear.weight)
    # The original goes on.
    made.model(X)
    assert made.calls == 1


@pytest.mark.parametrize("kind", [Net, Careful])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_undriven(kind: type[Net], protocol: int) -> None:
    made = driven(kind())
    found = pickle.loads(pickle.dumps(made.model, protocol))
    assert type(found) is kind
    assert set(vars(found)) == set(vars(kind()))
    assert found.seen == (["not carried"] if kind is Careful else [])
    assert torch.equal(found.linear.weight, made.model.linear.weight)
    made.model(X)
    assert made.calls == 1


def test_a_saved_model_loads_where_this_package_is_not_installed(tmp_path: Any) -> None:
    made = driven(nn.Linear(2, 2))
    path = tmp_path / "model.pt"
    torch.save(made.model, path)
    lines = (
        "import sys; sys.modules['kpt_lightning'] = None",
        f"import torch; model = torch.load({str(path)!r}, weights_only=False)",
        "print(type(model).__module__, list(model.state_dict()))",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.nn.modules.linear ['weight', 'bias']"


def test_a_state_dict_goes_both_ways() -> None:
    made, plain = driven(Net()), Net()
    plain.load_state_dict(made.model.state_dict())
    made.model.load_state_dict(plain.state_dict())
    buffer = io.BytesIO()
    torch.save(made.model.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == plain.state_dict().keys()


def test_ddp_wraps_it(tmp_path: Any) -> None:
    made = driven(Net(), bf16=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(made.model)
        wrapped(X).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert made.calls == 1
    assert made.model.seen == [(True, True)]
    assert made.model.linear.weight.grad is not None


def test_parts_that_the_user_compiles_afterwards_run_in_the_contexts() -> None:
    torch._dynamo.reset()
    inner = Net()
    made = driven(nn.Sequential(inner, nn.Identity()), bf16=True)
    inner.compile(backend="eager")
    assert made.model(X).dtype is torch.float32
    made.undo()
    assert made.model(X).dtype is torch.float32
    assert inner.seen == [(True, True), (True, False)]
    assert made.open == 0


def test_the_whole_compiled_by_the_user_afterwards_runs_in_the_contexts() -> None:
    torch._dynamo.reset()
    made = driven(Net(), bf16=True)
    compiled = torch.compile(made.model, backend="eager")
    assert compiled(X).dtype is torch.float32
    assert made.model.seen == [(True, True)]
    assert made.calls == 1


def test_code_of_a_module_that_is_changed_meanwhile_stays_changed() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x * 0

    model = Net()
    changed = swap_all(model, forward, {"": None}, "plan.test")
    made = driven(model)
    assert made.model(X).eq(0).all()
    made.undo()
    assert model(X).eq(0).all()
    swap_back(changed)
    assert type(model) is Net


def test_a_class_that_another_library_puts_on_it_stays_when_driving_ends() -> None:
    made = driven(Net())
    sharded = type("ShardedNet", (type(made.model),), {})
    made.model.__class__ = sharded
    made.model(X)
    made.undo()
    assert type(made.model) is sharded
    made.model(X)
    assert made.calls == 1


def test_classes_are_made_once() -> None:
    one, two = driven(Net()), driven(Net())
    assert type(one.model) is type(two.model)


def test_nothing_is_left_where_a_class_forbids_subclasses() -> None:
    class Final(nn.Module):
        def __init_subclass__(cls, /, required: int) -> None:
            super().__init_subclass__()

    model = Final()
    attributes = set(vars(model))
    with pytest.raises(TypeError, match="required"):
        drive(model, subject(model))
    assert type(model) is Final
    assert set(vars(model)) == attributes
