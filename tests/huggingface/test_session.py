import copy
import gc
import json
import pickle
import weakref
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from kpt_lightning.errors import ConfigError, VerificationError
from kpt_lightning.huggingface import Session
from kpt_lightning.huggingface.patches import patched
from kpt_lightning.precision.float8_linear import Float8Linear
from tests.huggingface.conftest import FP8
from tests.huggingface.tiny import llama, rows, train


def proofs(session: Session) -> dict[str, bool]:
    return {proof.subject: bool(proof) for plan in session.plans for proof in plan.proofs}


def run(mixed: str = "no", *, accumulate: int = 1, **settings: Any) -> list[float]:
    """Losses of an ordinary script."""
    accelerator = Accelerator(mixed_precision=mixed, gradient_accumulation_steps=accumulate, **settings)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=4))
    return train(accelerator, model, optimizer, loader)


@pytest.mark.parametrize("mixed", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_unmodified_loop_trains_in_fp8_and_proves_it(mixed: str, accumulate: int) -> None:
    plain = run(mixed, accumulate=accumulate)
    session = Session(FP8)
    with patched(session):
        losses = run(mixed, accumulate=accumulate)
    session.stop()
    assert proofs(session)["fp8 calls"]
    assert losses != plain
    assert losses == pytest.approx(plain, rel=0.01)


def test_without_changes_the_losses_are_the_same_to_the_last_bit() -> None:
    session = Session({"level": "conservative"})
    plain = run()
    with patched(session):
        assert run() == plain
    assert len(session.plans) == 1


def test_an_optimizer_made_before_keeps_its_parameters() -> None:
    model = llama()
    before = [id(parameter) for parameter in model.parameters()]
    session = Session(FP8)
    session.convert(Accelerator().state, [model])
    assert [id(parameter) for parameter in model.parameters()] == before


def test_only_the_model_that_trains_is_converted() -> None:
    student, teacher = llama(), llama()
    teacher.requires_grad_(False)
    session = Session(FP8)
    session.convert(Accelerator().state, [student, teacher])
    assert any(isinstance(module, Float8Linear) for module in student.modules())
    assert not any(isinstance(module, Float8Linear) for module in teacher.modules())
    (left,) = session.left_alone
    assert left.reason == "it has no parameter to train"


def test_two_models_and_two_accelerators_have_a_plan_each() -> None:
    session = Session(FP8)
    with patched(session):
        accelerator, other = Accelerator(), Accelerator()
        models = [nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(3)]
        first, second = accelerator.prepare(*models[:2])
        third = other.prepare(models[2])
        optimizer = torch.optim.SGD([*first.parameters(), *second.parameters(), *third.parameters()], lr=0.1)
        for _ in range(3):
            accelerator.backward(third(second(first(torch.randn(16, 32)))).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert len(session.plans) == 3
    assert all(any(proof.subject == "fp8 calls" and proof for proof in plan.proofs) for plan in session.plans)


def test_stop_puts_the_model_back() -> None:
    model = llama()
    kinds, attributes = [type(each) for each in model.modules()], set(vars(model))
    session = Session(FP8)
    session.convert(Accelerator().state, [model])
    assert [type(each) for each in model.modules()] != kinds
    session.stop()
    assert [type(each) for each in model.modules()] == kinds
    assert set(vars(model)) == attributes


def test_an_error_while_planning_leaves_the_model_as_it_was() -> None:
    model = llama()
    kinds = [type(each) for each in model.modules()]
    session = Session({**FP8, "parallel": "ddp"})
    with pytest.raises(ConfigError, match="parallel"):
        session.convert(Accelerator().state, [model])
    assert [type(each) for each in model.modules()] == kinds


def test_a_model_that_the_script_drops_is_freed() -> None:
    session = Session(FP8)
    model = llama()
    session.convert(Accelerator().state, [model])
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    session.stop()


def test_a_second_prepare_changes_nothing() -> None:
    session, accelerator, model = Session(FP8), Accelerator(), llama()
    with patched(session):
        accelerator.prepare_model(accelerator.prepare(model))
        accelerator.prepare(model)
    assert len(session.plans) == 1


def test_evaluation_alone_converts_nothing() -> None:
    session, model = Session(FP8), llama()
    with patched(session):
        Accelerator().prepare_model(model, evaluation_mode=True)
    assert session.plans == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_converted_model_is_plain_at_its_top(duplicate: Any) -> None:
    session, model = Session(FP8), llama()
    session.convert(Accelerator().state, [model])
    copied = duplicate(model)
    assert type(copied) is type(llama())
    copied(input_ids=rows(2))


def test_a_script_that_prepares_nothing_is_told() -> None:
    told: list[str] = []
    Session(say=told.append).conclude()
    assert "no model was prepared" in told[0]
    with pytest.raises(VerificationError, match="no model was prepared"):
        Session({"on_mismatch": "raise"}).conclude()


def test_a_model_without_a_linear_layer_is_refused_where_fp8_was_asked_for() -> None:
    from kpt_lightning.errors import UnsupportedHardwareError

    with pytest.raises(UnsupportedHardwareError, match="no linear layer"):
        Session(FP8).convert(Accelerator().state, [nn.Conv2d(3, 3, 3)])


def test_a_plan_is_followed(tmp_path: Any) -> None:
    first = Session({"precision": "bf16-mixed"})
    first.convert(Accelerator().state, [llama()])
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(first.plans[0].to_dict()))
    told: list[str] = []
    second = Session(plan=file, say=told.append)
    second.convert(Accelerator().state, [llama()])
    assert second.plans[0].precision == "bf16-mixed"
    assert second.plans[0].changes == first.plans[0].changes


def test_accelerates_compile_is_left_to_it_and_fp8_still_counted() -> None:
    from accelerate.utils import TorchDynamoPlugin

    session = Session(FP8)
    with patched(session):
        losses = run("bf16", dynamo_plugin=TorchDynamoPlugin(backend="eager"))
    assert proofs(session)["fp8 calls"]
    assert losses[-1] < losses[0]
    session.stop()
