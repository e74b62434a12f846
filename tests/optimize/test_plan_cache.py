"""A kept plan is found again for an equal run, and for no other."""

import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from kpt_lightning.candidates.autocast_bf16 import AutocastBf16
from kpt_lightning.candidates.candidate import Change
from kpt_lightning.candidates.float8 import Float8
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Accepted, Rejected
from kpt_lightning.hardware import HardwareProfile
from kpt_lightning.optimize import plan_cache
from kpt_lightning.optimize.driven import drive
from kpt_lightning.optimize.model_facts import model_facts
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.plan_cache import find_plan, keep_plan, plan_key
from kpt_lightning.optimize.trial_record import TrialRecord

PROFILES = Path(__file__).parents[1] / "hardware" / "profiles"
POOL = (AutocastBf16(), Float8())


def profile(name: str = "h100") -> HardwareProfile:
    return HardwareProfile.load(PROFILES / f"{name}.json")


class Norm(nn.Module):
    """With its epsilon in an attribute of a name of its own."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), eps


def model() -> Any:
    return nn.Sequential(nn.Linear(4, 4), Norm(), nn.Dropout(0.1), nn.GELU(), nn.TransformerEncoderLayer(4, 2, 8))


def subject(**known: Any) -> Subject:
    made = known.pop("model", None) or model()
    batch = {"x": torch.zeros(2, 4), "y": [torch.zeros(2, dtype=torch.long), "text"]}
    given = {"profile": profile(), "config": KptConfig(), "device": torch.device("cpu"), "batch": batch} | known
    return Subject(model=made, **given)


def key(precision: str = "32", pool: Any = POOL, **known: Any) -> str:
    return plan_key(subject(**known), pool, precision)


def plan(**more: Any) -> Plan:
    return Plan(
        config=KptConfig.build({"level": "aggressive"}), device="H100", precision="fp8", parallel="single",
        changes=[Change(candidate="float8", setting={"recipe": "tensorwise", "layers": ["0"]}, predicted=1.3)],
        trials=[TrialRecord(candidate="float8", kept=True, gain=1.2, low=1.1)], basis="trial",
        choices=[Accepted("precision fp8", "by trial"), Rejected("other", "no")], seconds=12.5,
        whole=TrialRecord(candidate="all kept changes", kept=True, gain=1.2, low=1.1, high=1.3), **more,
    )  # fmt: skip


def test_equal_runs_have_one_key() -> None:
    assert key() == key()
    # The values of weights and batch are not asked for.
    assert key(batch={"x": torch.ones(2, 4), "y": [torch.ones(2, dtype=torch.long), "other"]}) == key()


def test_the_key_is_the_same_in_another_process() -> None:
    lines = (
        "from tests.optimize.test_plan_cache import key",
        "print(key())",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == key()


def test_a_driven_model_has_the_key_of_the_plain_one() -> None:
    known = subject()
    before = plan_key(known, POOL, "32")
    undo = drive(known.model, known)
    assert plan_key(known, POOL, "32") == before
    undo()


def _changed(change: Callable[[Any], object]) -> dict[str, Any]:
    made = model()
    change(made)
    return {"model": made}


def _set(place: Callable[[Any], nn.Module], name: str, value: Any) -> Callable[[Any], object]:
    return lambda made: setattr(place(made), name, value)


CPU_CONFIG = {"float8": {"recipe": "rowwise"}}
OTHER = {
    "a parameter's size": lambda: _changed(lambda made: made.append(nn.Linear(4, 2))),
    "a parameter's dtype": lambda: _changed(lambda made: made[0].half()),
    "a frozen parameter": lambda: _changed(lambda made: made[0].requires_grad_(False)),
    "a module's class": lambda: _changed(lambda made: made.__setitem__(3, nn.ReLU())),
    "the order of modules": lambda: _changed(lambda made: made.insert(2, nn.Identity())),
    "train mode": lambda: _changed(lambda made: made[2].eval()),
    "an epsilon": lambda: _changed(_set(lambda made: made[1], "variance_epsilon", 1e-6)),
    "a probability": lambda: _changed(_set(lambda made: made[2], "p", 0.2)),
    "a form of activation": lambda: _changed(_set(lambda made: made[3], "approximate", "tanh")),
    "a function": lambda: _changed(_set(lambda made: made[4], "activation", F.silu)),
    "a switch": lambda: _changed(_set(lambda made: made[4], "norm_first", True)),
    "the batch's size": lambda: {"batch": {"x": torch.zeros(3, 4), "y": [torch.zeros(2, dtype=torch.long), "text"]}},
    "the batch's dtype": lambda: {"batch": {"x": torch.zeros(2, 4), "y": [torch.zeros(2), "text"]}},
    "the batch's names": lambda: {"batch": {"z": torch.zeros(2, 4), "y": [torch.zeros(2, dtype=torch.long), "text"]}},
    "the level": lambda: {"config": KptConfig.build({"level": "aggressive"})},
    "a setting": lambda: {"config": KptConfig.build(CPU_CONFIG)},
    "precision": lambda: {"precision": "bf16-mixed"},
    "the goal": lambda: {"goal": "memory"},
    "the machine": lambda: {"profile": profile("a100")},
    "the number of devices": lambda: {"profile": replace(profile(), devices=profile().devices * 2)},
    "the candidates": lambda: {"pool": POOL[:1]},
    "an optimizer": lambda: {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)},
    "a loader": lambda: {"loader": DataLoader([1, 2])},
}


@pytest.mark.parametrize("fact", OTHER)
def test_each_fact_makes_another_key(fact: str) -> None:
    assert key(**OTHER[fact]()) != key()


def norm_of(rule: Any) -> Any:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        forward = rule

    return Norm()


def test_classes_of_one_name_with_other_rules_have_other_keys() -> None:
    plain, shifted = norm_of(lambda self, x: x * self.weight), norm_of(lambda self, x: x * (1 + self.weight))
    assert key(model=plain) == key(model=plain) != key(model=shifted)


def test_another_loss_function_has_another_key() -> None:
    known = subject()
    losses = [F.mse_loss, F.l1_loss, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)]
    found = {plan_key(known, POOL, "32", (each,)) for each in losses}
    assert len(found | {plan_key(known, POOL, "32")}) == 5


def test_optimizers_and_loaders_differ_by_their_settings() -> None:
    weights = [nn.Parameter(torch.ones(1))]
    optimizers = [torch.optim.AdamW(weights, fused=fused) for fused in (None, True, False)]
    keys = {key(optimizer=each) for each in [*optimizers, torch.optim.Adam(weights)]}
    assert len(keys) == 4
    assert key(optimizer=torch.optim.AdamW(weights, lr=0.5)) in keys
    loaders = [DataLoader([1, 2], batch_size=1), DataLoader([1, 2], batch_size=2), DataLoader([1], num_workers=1)]
    assert len({key(loader=each) for each in loaders}) == 3


@pytest.mark.parametrize("name", ["kpt-lightning", "liger-kernel", "triton"])
def test_a_version_of_a_package_makes_another_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    right = plan_cache.installed_version
    # What is installed is not the thing under test.
    monkeypatch.setattr(plan_cache, "installed_version", lambda each: "0.0" if each == name else right(each))
    package = next((each for each in plan_cache.ALL if each.distribution == name), None)
    if package is not None:
        others = tuple(each for each in plan_cache.ALL if each is not package)
        monkeypatch.setattr(plan_cache, "ALL", (replace(package, distribution="torch"), *others))
    assert key() != before


def test_a_flag_of_torch_makes_another_key() -> None:
    before, now = torch.get_float32_matmul_precision(), key()
    torch.set_float32_matmul_precision("medium")
    try:
        assert key() != now
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_is_only_of_this_run_makes_no_other_key() -> None:
    def add(made: Any) -> None:
        made.log_dir, made.started = "runs/2026-01-01T12:00", "2026-01-01"
        made._counter, made.history, made.last = 7, [1, 2], torch.ones(3)

    assert key(**_changed(add)) == key()


def test_settings_of_a_transformers_model_are_facts() -> None:
    def llama(**settings: Any) -> list[Any]:
        sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
        return model_facts(LlamaForCausalLM(LlamaConfig(**(sizes | settings))))

    plain = llama()
    assert plain == llama()
    for settings in ({"rms_norm_eps": 1e-5}, {"attn_implementation": "eager"}, {"attention_dropout": 0.5}):
        assert llama(**settings) != plain, settings
    assert json.loads(json.dumps(plain))


def test_a_plan_is_found_as_it_was_kept(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    assert find_plan(directory, "k") is None
    keep_plan(directory, "k", plan())
    assert find_plan(directory, "k") == plan()
    assert find_plan(directory, "other") is None
    assert [each.name for each in directory.iterdir()] == ["k.json"]


def test_a_later_plan_takes_the_place_of_an_earlier(tmp_path: Path) -> None:
    keep_plan(tmp_path, "k", plan())
    keep_plan(tmp_path, "k", replace(plan(), precision="32"))
    found = find_plan(tmp_path, "k")
    assert found is not None
    assert found.precision == "32"


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"config": {}}', "null", "3", "[1]", '"plan"', "\x00\x01", json.dumps({"changes": 1})],
)
def test_a_file_that_holds_no_plan_is_a_warning_and_made_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "k.json").write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"kept plan .*k.json cannot be read and is made anew"):
        assert find_plan(tmp_path, "k") is None
    keep_plan(tmp_path, "k", plan())
    assert find_plan(tmp_path, "k") == plan()


@pytest.mark.parametrize("cut", [1, 10, 200, -1])
def test_a_torn_file_is_a_warning(tmp_path: Path, cut: int) -> None:
    keep_plan(tmp_path, "k", plan())
    path = tmp_path / "k.json"
    path.write_text(path.read_text(encoding="utf-8")[:cut], encoding="utf-8")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert find_plan(tmp_path, "k") is None


@pytest.mark.parametrize("field", ["config", "changes", "trials", "whole", "choices"])
@pytest.mark.parametrize("value", [5, "x", [5], {"a": 1}, [{"a": 1}]])
def test_a_plan_of_another_form_is_a_warning(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "k.json").write_text(json.dumps(plan().to_dict() | {field: value}), encoding="utf-8")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert find_plan(tmp_path, "k") is None


def test_bytes_that_are_no_text_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "k.json").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert find_plan(tmp_path, "k") is None


def test_a_directory_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    # A file in the place of a folder stops root too.
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"cannot be kept in .*file"):
        keep_plan(tmp_path / "file" / "plans", "k", plan())


def test_a_read_only_directory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    # Permissions do not stop root, so the system's answer is put in.
    monkeypatch.setattr(plan_cache.tempfile, "mkstemp", refuse)
    with pytest.warns(UserWarning, match="Permission denied"):
        keep_plan(tmp_path, "k", plan())
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_is_no_json_is_a_warning_and_leaves_no_file(tmp_path: Path) -> None:
    bad = plan()
    bad.changes.append(Change(candidate="foreign", setting={"dtype": torch.bfloat16}))
    with pytest.warns(UserWarning, match=r"cannot be kept .*JSON"):
        keep_plan(tmp_path, "k", bad)
    assert list(tmp_path.iterdir()) == []


def test_writing_that_fails_half_way_leaves_the_earlier_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_plan(tmp_path, "k", plan())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plan_cache.os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        keep_plan(tmp_path, "k", replace(plan(), precision="32"))
    assert [each.name for each in tmp_path.iterdir()] == ["k.json"]
    assert find_plan(tmp_path, "k") == plan()


def test_many_writers_and_readers_see_whole_plans(tmp_path: Path) -> None:
    plans = [replace(plan(), device=f"{number}" * 2000) for number in range(4)]
    faults: list[object] = []

    def work(mine: Plan) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(20):
                keep_plan(tmp_path, "k", mine)
                found = find_plan(tmp_path, "k")
                if found not in plans:
                    faults.append(found)

    threads = [threading.Thread(target=work, args=(each,)) for each in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert [each.name for each in tmp_path.iterdir()] == ["k.json"]
