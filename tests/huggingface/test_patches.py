import pytest
from accelerate import Accelerator

from kpt_lightning.errors import ConfigError
from kpt_lightning.huggingface import Session
from kpt_lightning.huggingface.patches import patched

METHODS = ("__init__", "prepare", "prepare_model")


def test_each_method_is_accelerates_own_and_public() -> None:
    assert all(callable(vars(Accelerator)[name]) for name in METHODS)


@pytest.mark.parametrize("fails", [False, True])
def test_accelerate_is_as_before_afterwards(fails: bool) -> None:
    before = {name: vars(Accelerator)[name] for name in METHODS}
    try:
        with patched(Session()):
            assert all(vars(Accelerator)[name] is not before[name] for name in METHODS)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert {name: vars(Accelerator)[name] for name in METHODS} == before


def test_a_method_that_the_script_replaced_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(self: object, *objects: object) -> object:
        return objects

    monkeypatch.setattr(Accelerator, "prepare", Accelerator.prepare)
    with patched(Session()):
        Accelerator.prepare = mine
    assert vars(Accelerator)["prepare"] is mine


def test_accelerates_own_fp8_is_refused_when_the_accelerator_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    with patched(Session()), pytest.raises(ConfigError, match="mixed_precision='fp8'"):
        accelerator = Accelerator()
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp8")
        Accelerator()
        del accelerator
