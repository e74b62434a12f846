"""Running a model inside ``preserved`` leaves no trace: every claim is checked bit for bit."""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from kpt_lightning.errors import KptError
from kpt_lightning.validation.reachable import survey
from kpt_lightning.validation.state import preserved, seed_all, surrounded_by


class Meter:
    """A helper of a user's, as research code keeps them on modules."""

    def __init__(self) -> None:
        self.count = 0
        self.history: list[float] = []


class Owner:
    """The program around a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.steps, self.data = model, 0, [torch.zeros(4)]


class HasState(nn.Module):
    """Keeps everything that a forward pass may change, in every way that Python offers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.name = "before"
        self.history: list[Any] = [1, [2, 3], {"deep": [4]}]
        self.table: dict[str, Any] = {"b": 1, "a": torch.zeros(2)}
        self.ordered = OrderedDict(b=1, a=2)
        self.groups: defaultdict[str, list[int]] = defaultdict(list, x=[1])
        self.votes = Counter("aab")
        self.queue = deque([1, 2], maxlen=2)
        self.members = {1, 2}
        self.pair = (torch.zeros(3), [1])
        self.cache: Tensor | None = torch.ones(2, 2)
        self.array = np.arange(3.0)
        self.meter = Meter()
        self.generators = [torch.Generator().manual_seed(1), random.Random(1)]
        self.numpy_generators = (np.random.default_rng(1), np.random.RandomState(1))
        self.register_buffer("bank", torch.zeros(4))
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.name = "after"
        self.history.append(5)
        self.history[1].append(6)
        self.history[2]["deep"].clear()
        self.table["a"].add_(1)
        self.table["c"] = self.table.pop("b")
        self.ordered.move_to_end("b")
        self.groups["x"].append(2)
        self.groups["new"].append(3)
        self.votes["b"] += 7
        self.queue.append(3)
        self.members.symmetric_difference_update({2, 9})
        self.pair[0].fill_(7)
        self.pair[1].append(2)
        self.cache = None if self.cache is None else self.cache * 2
        self.array += 1
        self.meter.count += 1
        self.meter.history.append(0.5)
        self.meter.extra = 1  # type: ignore[attr-defined]
        torch.rand(2, generator=self.generators[0])
        self.generators[1].random()
        self.numpy_generators[0].random()
        self.numpy_generators[1].rand()
        self.bank[0] = 9
        self.none = torch.ones(1)
        self.lazily = [1, 2]
        self.register_buffer("late", torch.ones(1))
        if not hasattr(self, "head"):
            self.head = nn.Linear(4, 4)
        self.linear.weight.requires_grad_(False)
        self.linear.eval()
        out: Tensor = self.head(self.linear(x))
        return out


def described(model: nn.Module) -> Any:
    """Everything that hangs on a model, with the identity of each object and the bits of each tensor."""
    seen: set[int] = set()

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value.requires_grad, value.dtype, value.detach().tolist()
        if isinstance(value, np.ndarray):
            return id(value), value.tolist()
        if isinstance(value, torch.Generator):
            return id(value), value.get_state().tolist()
        if isinstance(value, random.Random):
            return id(value), value.getstate()
        if isinstance(value, np.random.Generator):
            return id(value), repr(value.bit_generator.state)
        if isinstance(value, np.random.RandomState):
            return id(value), repr(value.get_state())
        if id(value) in seen:
            return id(value)
        if isinstance(value, dict):
            seen.add(id(value))
            return id(value), [(key, describe(item)) for key, item in value.items()]
        if isinstance(value, list | tuple | deque):
            seen.add(id(value))
            return id(value), [describe(item) for item in value]
        if isinstance(value, set):
            return id(value), sorted(value)
        if isinstance(value, nn.Module | Meter | SimpleNamespace):
            seen.add(id(value))
            return id(value), [(key, describe(item)) for key, item in sorted(vars(value).items())]
        return repr(value) if isinstance(value, int | float | str) else id(value)

    return describe(model)


def rng() -> tuple[Any, ...]:
    return random.getstate(), torch.get_rng_state().tolist(), repr(np.random.get_state())


@pytest.mark.parametrize("how", [None, ValueError, KeyboardInterrupt])
def test_attributes_buffers_flags_and_modes_are_what_they_were(how: type[BaseException] | None) -> None:
    model = HasState()
    before = described(model)

    def run() -> None:
        with preserved(model):
            model(torch.ones(2, 4)).sum().backward()
            model.linear.weight.grad = None
            assert described(model) != before
            if how is not None:
                raise how

    if how is None:
        run()
    else:
        with pytest.raises(how):
            run()
    assert described(model) == before


def test_the_state_is_put_back_each_time() -> None:
    model = HasState()
    before = described(model)
    for _ in range(3):
        with preserved(model), preserved(model):
            model(torch.ones(2, 4))
        assert described(model) == before


@pytest.mark.parametrize("how", [None, ValueError, KeyboardInterrupt])
def test_random_state_of_python_numpy_and_torch_is_put_back(how: type[BaseException] | None) -> None:
    before = rng()
    try:
        with preserved(nn.Linear(2, 2)):
            seed_all(3)
            random.random(), torch.rand(5), np.random.rand(5)
            if how is not None:
                raise how
    except (ValueError, KeyboardInterrupt):
        pass
    # Making the layer draws; so do not compare with what was before it.
    with preserved(nn.Identity()):
        now = rng()
    assert rng() == now
    assert before != now


def test_equal_seeds_give_equal_draws_everywhere() -> None:
    draws = []
    for _ in range(2):
        with preserved(nn.Identity()):
            seed_all(7)
            draws.append((random.random(), torch.rand(3).tolist(), np.random.rand(3).tolist()))
    assert draws[0] == draws[1]


@pytest.mark.cuda
def test_random_state_of_cuda_is_put_back() -> None:
    torch.rand(1, device="cuda")
    before = [each.tolist() for each in torch.cuda.get_rng_state_all()]
    with preserved(nn.Identity()):
        seed_all(1)
        torch.rand(8, device="cuda")
    assert [each.tolist() for each in torch.cuda.get_rng_state_all()] == before


@pytest.mark.parametrize("how", [None, ValueError, KeyboardInterrupt])
def test_gradients_are_the_same_tensor_objects_with_the_same_content(how: type[BaseException] | None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0](torch.ones(2, 4)).sum().backward()
    grads = [each.grad for each in model.parameters()]
    content = [None if each is None else each.clone() for each in grads]
    assert grads[0] is not None
    assert grads[2] is None
    try:
        with preserved(model):
            assert all(each.grad is None for each in model.parameters())
            model(torch.ones(2, 4)).square().sum().backward()
            assert all(each.grad is not None for each in model.parameters())
            if how is not None:
                raise how
    except (ValueError, KeyboardInterrupt):
        pass
    for each, grad, copy in zip(model.parameters(), grads, content, strict=True):
        assert each.grad is grad
        assert copy is None or torch.equal(grad, copy)  # type: ignore[arg-type]


def test_a_leaf_that_is_no_parameter_keeps_its_gradient() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(3, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = Scaled()
    model(torch.ones(3)).sum().backward()
    grad = model.scale.grad
    assert grad is not None
    with preserved(model):
        model(torch.full((3,), 5.0)).sum().backward()
    assert model.scale.grad is grad
    assert grad.tolist() == [1.0, 1.0, 1.0]


def test_batch_norm_statistics_are_put_back_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    norm: Any = model[1]
    mean, count = norm.running_mean, norm.num_batches_tracked
    with preserved(model):
        model(torch.randn(2, 3, 8, 8))
        assert norm.running_mean.any()
        assert count == 1
    assert norm.running_mean is mean
    assert norm.num_batches_tracked is count
    assert not mean.any()
    assert count == 0


class Changes(nn.Module):
    """A buffer that a forward pass changes in a way of the test's."""

    def __init__(self, buffer: Tensor, change: Callable[["Changes"], None]) -> None:
        super().__init__()
        self.register_buffer("buffer", buffer)
        self.change = change

    def forward(self) -> None:
        self.change(self)


def _resize(module: Any) -> None:
    module.buffer.data = torch.ones(7)


def _halve(module: Any) -> None:
    module.buffer.data = module.buffer.data.half()


def _fill(module: Any) -> None:
    module.buffer.fill_(5)


def _fill_past_the_version(module: Any) -> None:
    module.buffer.data.fill_(5)


def _rebind(module: Any) -> None:
    module.buffer = module.buffer + 1


def _drop(module: Any) -> None:
    del module.buffer


@pytest.mark.parametrize("change", [_resize, _halve, _fill, _fill_past_the_version, _rebind, _drop])
@pytest.mark.parametrize("buffer", [torch.arange(3.0), torch.tensor([1.0, float("nan")]), torch.eye(3)[:, 1]])
def test_a_buffer_comes_back_however_it_was_changed(buffer: Tensor, change: Callable[[Any], None]) -> None:
    model = Changes(buffer.clone(), change)
    object_before, content = model.buffer, model.buffer.clone()
    with preserved(model):
        model()
    assert model.buffer is object_before
    assert model.buffer.dtype == content.dtype
    assert torch.equal(model.buffer.nan_to_num(), content.nan_to_num())


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(1).expand(4, 4),
        torch.arange(3.0).expand(2, 3),
        torch.eye(3).to_sparse(),
        torch.empty(0),
        torch.tensor(1 + 2j),
        torch.zeros(3, device="meta"),
        torch.arange(6.0).unfold(0, 3, 1),
    ],
    ids=["expanded", "expanded in part", "sparse", "empty", "complex", "meta", "overlapping"],
)
def test_unusual_buffers_that_stay_as_they_are_are_no_obstacle(buffer: Tensor) -> None:
    model = Changes(buffer, lambda module: None)
    with preserved(model):
        model()
    assert model.buffer is buffer


def test_a_sparse_buffer_is_put_back() -> None:
    def change(module: Any) -> None:
        module.buffer.mul_(3)

    model = Changes(torch.eye(3).to_sparse(), change)
    with preserved(model):
        model()
        assert model.buffer.to_dense()[0, 0] == 3
    assert torch.equal(model.buffer.to_dense(), torch.eye(3))


def test_a_cache_made_in_inference_mode_is_no_obstacle() -> None:
    with torch.inference_mode():
        made = torch.ones(3)
    model = Changes(made, lambda module: None)
    model.attribute = made  # type: ignore[assignment]
    with preserved(model):
        model()
    assert model.attribute is made


def test_what_did_not_change_is_not_written_so_a_graph_of_the_users_stays_valid() -> None:
    model = HasState()
    assert isinstance(model.bank, Tensor)
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * model.bank).sum()
    version = model.bank._version
    with preserved(model):
        pass
    assert model.bank._version == version
    loss.backward()
    assert weight.grad is not None


def test_a_model_that_writes_to_its_own_parameter_is_found_out() -> None:
    class Clips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.linear.weight.clamp_(-0.1, 0.1)
            return self.linear(x)  # type: ignore[no-any-return]

    model = Clips()
    with pytest.raises(KptError, match=r"writes to its own parameter 'linear.weight'.*plan by rules"), preserved(model):
        model(torch.ones(1, 2))
    with preserved(model, weights=False):
        model(torch.ones(1, 2))


def test_an_encoder_that_follows_another_by_its_data_is_found_out() -> None:
    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for mine, other in zip(self.key.parameters(), self.query.parameters(), strict=True):
                mine.data = 0.9 * mine.data + 0.1 * other.data
            return self.key(x) - self.query(x)  # type: ignore[no-any-return]

    model = Momentum()
    with pytest.raises(KptError, match=r"own parameter 'key\.(weight|bias)'"), preserved(model):
        model(torch.ones(1, 4))
    with preserved(model, weights=False):
        model(torch.ones(1, 4))


def test_an_optimizer_step_from_a_hook_of_backward_is_found_out() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(KptError, match="its own parameter"), preserved(model):
        model(torch.ones(1, 2)).sum().backward()


def test_an_error_of_the_model_is_not_hidden_by_the_check_of_its_weights() -> None:
    model = nn.Linear(2, 2)

    def fail() -> None:
        with preserved(model), torch.no_grad():
            model.weight.zero_()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_tied_weights_stay_tied() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    tokens = torch.arange(8)[None]
    weight = model.lm_head.weight
    with preserved(model):
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert weight.grad is not None
    assert model.lm_head.weight is model.transformer.wte.weight is weight
    assert weight.grad is None


@pytest.mark.parametrize("train", [True, False])
def test_transformers_models_are_what_they_were(train: bool) -> None:
    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=16)
    model = BertModel(BertConfig(**sizes)).train(train)
    model.encoder.layer[0].eval()
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    before, config = described(model), model.config.to_dict()
    with preserved(model):
        model(input_ids=torch.arange(8)[None]).last_hidden_state.sum().backward()
        model.train(not train)
        model.requires_grad_(True)
    assert described(model) == before
    assert model.config.to_dict() == config
    assert all(each.grad is None for each in model.parameters())


class ListMetric(nn.Module):
    """State as torchmetrics keeps it: lists of tensors, added to and rebound."""

    def __init__(self) -> None:
        super().__init__()
        self._defaults: dict[str, Any] = {"preds": [], "total": torch.tensor(0)}
        self.preds: list[Tensor] = []
        self.total = torch.tensor(0)
        self._computed: Any = None
        self._update_count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.preds.append(x.detach())
        self.total = self.total + 1
        self._update_count += 1
        self._computed = torch.cat(self.preds)
        return x

    def reset(self) -> None:
        self.preds, self.total = list(self._defaults["preds"]), self._defaults["total"].clone()


def test_a_metric_with_lists_of_tensors_is_what_it_was() -> None:
    metric = ListMetric()
    metric(torch.ones(1, 2))
    model = nn.Sequential(nn.Linear(2, 2), metric)
    before = described(model)
    with preserved(model):
        model(torch.ones(3, 2))
        metric.reset()
        model(torch.ones(3, 2))
    assert described(model) == before
    assert len(metric.preds) == 1


def test_cycles_and_deep_nests_are_walked_once() -> None:
    model: Any = nn.Linear(2, 2)
    cycle: list[Any] = [model]
    cycle.append(cycle)
    model.cycle, model.table = cycle, {"self": cycle}
    model.table["table"] = model.table
    model.hidden_parent = [model]
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    model.deep = deep
    with preserved(model):
        cycle.append(1)
        model.table.clear()
    assert len(cycle) == 2
    assert cycle[1] is cycle
    assert list(model.table) == ["self", "table"]
    # Taken apart by hand: freeing such a nest recurses in C.
    while deep:
        deep = deep.pop()


def test_weights_that_attributes_refer_to_are_not_copied() -> None:
    model: Any = nn.LSTM(256, 256)
    model.all_weights_again = list(model.parameters())
    model.view = model.weight_ih_l0.data.t()
    model.pairs = {"w": (model.weight_hh_l0, model.weight_hh_l0.detach()[:10])}
    copied = []

    class Clones(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if "clone" in str(func) or "copy" in str(func):
                copied.append(out.numel())
            return out

    with Clones(), preserved(model):
        pass
    # A few elements are looked at, of a quarter of a million.
    assert max(copied) <= 256


def test_writing_to_a_weight_through_another_name_of_its_memory_is_found_out() -> None:
    model: Any = nn.Linear(4, 4)
    model.view = model.weight.data.t()
    with pytest.raises(KptError, match="'weight'"), preserved(model):
        model.view.zero_()


def test_a_module_kept_in_a_plain_list_is_looked_after() -> None:
    class Distils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Linear(4, 4)
            self._teacher = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))]

        def forward(self, x: Tensor) -> Tensor:
            return (self.student(x) - self._teacher[0](x)).square().sum()

    model = Distils()
    teacher: Any = model._teacher[0]
    with preserved(model):
        model(torch.randn(3, 4)).backward()
        teacher.eval()
        assert teacher[0].weight.grad is not None
    assert teacher[0].weight.grad is None
    assert teacher.training
    assert teacher[1].num_batches_tracked == 0


def test_the_program_around_a_model_and_objects_of_libraries_are_left_alone() -> None:
    model: Any = nn.Linear(2, 2)
    model.owner = Owner(model)
    model.loader = torch.utils.data.DataLoader([1, 2, 3])
    model.library = SimpleNamespace(steps=0)
    found = survey(model)
    assert len(found.modules) == 1
    with preserved(model):
        model.owner.steps = 3
        model.library.steps = 3
    assert model.owner.steps == model.library.steps == 3


def test_a_lazy_module_is_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(KptError, match=r"'0.weight' has no size.*Run the model once before"), preserved(model):
        pass


def test_parametrized_weights_keep_their_power_iteration() -> None:
    torch.manual_seed(0)
    model = parametrizations.spectral_norm(nn.Linear(4, 4))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with preserved(model):
        model(torch.randn(2, 4)).sum().backward()
        assert not all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_hooks_added_inside_vanish_and_their_handles_can_still_be_removed() -> None:
    model, calls = nn.Linear(2, 2), []
    with preserved(model):
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        model(torch.ones(1, 2))
    model(torch.ones(1, 2))
    handle.remove()
    assert calls == [1]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_the_class_of_a_module_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with preserved(model):
        model[1].__class__ = Doubled
    assert type(model[1]) is nn.Linear


def test_what_surrounds_a_model_is_looked_after_like_the_model() -> None:
    model, loss, scale = nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Parameter(torch.ones(()))
    rows, options = torch.ones(3, 2, requires_grad=True), {"lr": 0.1}

    def run() -> None:
        loss(model(rows * scale)).square().sum().backward()
        rows.data.mul_(2)
        options["lr"] = 1.0

    with surrounded_by(loss, scale), surrounded_by(rows, options), preserved(model):
        run()
        assert scale.grad is not None
    assert scale.grad is rows.grad is loss.weight.grad is None
    assert loss.num_batches_tracked == 0
    assert bool(rows.eq(1).all())
    assert options == {"lr": 0.1}
    with preserved(model):
        run()
    assert loss.num_batches_tracked == 1


def test_surroundings_that_a_pass_writes_its_weights_into_are_found_out() -> None:
    model, scale = nn.Linear(2, 2), nn.Parameter(torch.ones(()))
    with pytest.raises(KptError, match="hidden parameter"), surrounded_by(scale), preserved(model):
        scale.data.mul_(2)
