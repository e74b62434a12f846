"""Logits that are computed only where somebody looks at them are what the head gives, gradients included."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.candidates.deferred_logits import DeferredLogits, defer
from kpt_lightning.validation.numerics import relative_error
from tests.candidates.fused_loss import BF16, LENGTH, VOCABULARY, assert_alike, batch, build, changed, results, square


def test_the_logits_are_not_computed_unless_somebody_looks() -> None:
    model = build()
    with changed(model):
        logits = model(**batch()).logits
        assert isinstance(logits, DeferredLogits)
        assert (logits.shape, logits.dtype, logits.requires_grad) == ((2, LENGTH, VOCABULARY), torch.float32, True)
        assert not logits.computed
        logits.argmax(-1)
        assert logits.computed


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: x.softmax(-1),
    "index": lambda x: x[:, -1, 3:9],
    "detach": lambda x: x.detach(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "data": lambda x: x.data,
    "float": lambda x: x.float() * 1,
    "cat": lambda x: torch.cat([x, x]),
    "where": lambda x: torch.where(x > 0, x, 0),
    "out": lambda x: torch.add(1, x),
    "repr": lambda x: torch.tensor([ord(each) for each in repr(x.detach())]),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "data_ptr": lambda x: torch.tensor(x.data_ptr() != 0),
    "view": lambda x: x.view(-1, VOCABULARY).sum(0),
    "copy": lambda x: torch.empty(x.shape).copy_(x),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whatever_looks_at_the_logits_finds_them(look: str) -> None:
    model = build()
    wanted = LOOKS[look](model(**batch()).logits)
    with changed(model):
        found = LOOKS[look](model(**batch()).logits)
    assert not isinstance(found, DeferredLogits)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


def masked(logits: Tensor) -> Tensor:
    logits[..., 5] = 0.0
    return (logits[..., 4:7] * 3).square().sum()


def scaled_in_place(logits: Tensor) -> Tensor:
    return logits.div_(3.0).square().sum()


@pytest.mark.parametrize(
    "loss", [square, _Custom.apply, masked, scaled_in_place], ids=["square", "custom", "masked", "in place"]
)
def test_gradients_flow_through_the_logits_too(loss: Callable[[Tensor], Tensor]) -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        out = model(**batch())
        total = out.loss + loss(out.logits)
        names, parameters = zip(*model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(total, parameters), strict=True))

    model = build("gpt2")
    before = gradients(model)
    with changed(model):
        assert_alike(before, gradients(model), allowed=2e-5)


def test_logits_that_are_read_after_the_weight_changed_are_an_error_not_others() -> None:
    model = build()
    with changed(model):
        seen, late = model(**batch()).logits, model(**batch()).logits
        wanted = seen.detach().clone()
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)
        assert torch.equal(seen.detach(), wanted)
        with pytest.raises(RuntimeError, match=r"read them before optimizer.step\(\)"):
            late.argmax(-1)


def test_a_gradient_of_the_logits_that_cannot_come_is_asked_for_in_vain_loudly() -> None:
    model = build()
    with changed(model):
        logits = model(**batch()).logits
        with pytest.raises(RuntimeError, match="without these logits"):
            logits.retain_grad()


def test_logits_are_computed_in_the_dtype_of_their_own_autocast() -> None:
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", BF16):
        inside = defer(hidden, weight, None)
    outside = defer(hidden, weight, None)
    with torch.autocast("cpu", BF16):
        outside.argmax()
    assert (inside.detach().dtype, outside.detach().dtype) == (BF16, torch.float32)
    torch.testing.assert_close(outside.detach(), nn.functional.linear(hidden, weight).detach())


def test_a_cast_of_all_outputs_computes_nothing() -> None:
    model = build()

    def cast(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", BF16):
            return model(**batch()).logits.float()

    wanted = cast(model)
    (truth,) = torch.autograd.grad(wanted.square().sum(), model.lm_head.weight)
    with changed(model):
        found = cast(model)
        assert isinstance(found, DeferredLogits)
        assert not found.computed
        assert found.dtype == torch.float32
        (grad,) = torch.autograd.grad(found.square().sum(), model.lm_head.weight)
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-2, atol=1e-2)
    assert relative_error(truth, grad) < 0.02


def test_without_labels_or_gradient_nothing_changes_for_the_user() -> None:
    model = build()
    tokens = batch()["input_ids"]
    wanted = model(tokens).logits
    texts = model.generate(tokens, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        evaluated = model(**batch())
    with changed(model):
        assert torch.equal(model(tokens).logits + 0, wanted)
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), texts)
        with torch.no_grad():
            found = model(**batch())
        assert type(found.logits) is Tensor
        assert torch.equal(found.loss, evaluated.loss)
        with torch.inference_mode():
            assert torch.equal(model(**batch()).loss, evaluated.loss)


def test_undo_leaves_no_trace() -> None:
    model = build("llama tied")
    before = (type(model.lm_head), set(vars(model)), set(vars(model.lm_head)), list(model.state_dict()))
    parameters = [id(each) for each in model.parameters()]
    with changed(model):
        assert list(model.state_dict()) == before[3]
        assert [id(each) for each in model.parameters()] == parameters
        assert isinstance(model.lm_head, nn.Linear)
    assert (type(model.lm_head), set(vars(model)), set(vars(model.lm_head)), list(model.state_dict())) == before


def test_a_changed_model_can_be_copied_and_pickled() -> None:
    model = build()
    before = results(model)
    with changed(model):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(twin(**batch()).logits, DeferredLogits)
            assert_alike(before, results(twin))


def test_inside_compiled_code_the_head_gives_plain_logits() -> None:
    model = build()
    before = results(model)
    with changed(model):
        compiled = torch.compile(model, backend="eager")
        out = compiled(**batch())
        assert type(out.logits) is Tensor
        torch.testing.assert_close(out.loss.detach(), before["loss"])
