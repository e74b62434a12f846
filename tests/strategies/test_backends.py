"""FP8 by another library's layers: chosen by a setting, told in the plan, proved as far as can be, undone."""

from typing import Any

import pytest
import torch
from torch import nn

from kpt_lightning import KptConfig
from kpt_lightning.errors import ConfigError, UnsupportedHardwareError
from kpt_lightning.hardware import detect
from kpt_lightning.optional import TORCHAO
from kpt_lightning.precision.foreign_linear import ForeignLinear
from tests.strategies.awkward import Net, batches, fit

TORCHAO_EMULATED = {"float8": {"backend": "torchao", "emulate": True, "only_where_it_pays": False}}
needs_torchao = pytest.mark.skipif(not TORCHAO.available(), reason=TORCHAO.available().reason)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@needs_torchao
def test_a_model_trains_on_torchaos_layers_and_has_its_own_back_afterwards() -> None:
    module = Net()
    trainer = fit(module, batches(8), config=TORCHAO_EMULATED, precision="fp8")
    assert module.kinds == {ForeignLinear.__name__}
    assert module.losses[-1] < module.losses[0]
    plan: Any = trainer.strategy.plan  # type: ignore[attr-defined]
    assert "2 of 2 linear layers in FP8 (tensorwise, by torchao)" in plan.summary()
    proofs = {proof.subject: proof for proof in plan.proofs}
    assert proofs["fp8 gradients"]
    assert "nothing else shows what another library runs" in proofs["fp8 kernels"].reason
    assert all(type(each) is nn.Linear for each in module.net if isinstance(each, nn.Linear))


@needs_torchao
def test_it_loses_as_much_as_our_own_layers() -> None:
    losses = {}
    for backend in ("native", "torchao"):
        torch.manual_seed(0)
        module = Net()
        config = {"float8": TORCHAO_EMULATED["float8"] | {"backend": backend}}
        fit(module, batches(8), config=config, precision="fp8")
        losses[backend] = module.losses
    assert losses["torchao"] == pytest.approx(losses["native"], rel=0.02)
    assert losses["torchao"] != losses["native"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"float8": {"backend": "torchao", "odd_dims": "pad"}}, "padding goes with backend 'native'"),
        ({"float8": {"backend": "torchao"}, "parallel": "fsdp2"}, "Parameters that fsdp2 exchanges"),
        ({"float8": {"backend": "cutlass"}}, "float8.backend='cutlass'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        KptConfig.build({"precision": "fp8", **settings})


def test_a_missing_torchao_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    from kpt_lightning.optimize.rules import check_explicit

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "torchao" else found(name, *more))
    config = KptConfig.build({"precision": "fp8", "float8": {"backend": "torchao", "emulate": True}})
    with pytest.raises(UnsupportedHardwareError, match=r"pip install 'kpt-lightning\[kernels\]'"):
        check_explicit(config, detect())
