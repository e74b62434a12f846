"""How far ``preserved`` reaches: what a model refers to, and what it leaves alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from kpt_lightning.errors import KptError
from kpt_lightning.validation.reachable import survey
from kpt_lightning.validation.state import preserved, surrounded_by
from tests.validation.stateful import described


class Owner:
    """The program around a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.steps, self.data = model, 0, [torch.zeros(4)]


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
