"""What is decided for each stored machine, on a Llama with layers of real size and no memory."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Accepted
from kpt_lightning.errors import UnsupportedHardwareError
from kpt_lightning.hardware import HardwareProfile
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.rules import check_explicit, make_plan, on_device

PROFILES = Path(__file__).parents[1] / "hardware" / "profiles"


def load(name: str) -> HardwareProfile:
    return HardwareProfile.load(PROFILES / f"{name}.json")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 16}
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32000, **sizes))


def plan(model: nn.Module, machine: HardwareProfile | str, **settings: Any) -> Plan:
    profile = load(machine) if isinstance(machine, str) else machine
    return make_plan(model, KptConfig.build(settings), profile, parallel=Accepted("parallel single", "by device count"))


def reason(plan: Plan, subject: str) -> str:
    return "; ".join(each.reason for each in plan.explain(subject))


def without(machine: str, version: str) -> HardwareProfile:
    profile = load(machine)
    return replace(profile, versions={key: value for key, value in profile.versions.items() if key != version})


@pytest.mark.parametrize("machine", ["h100", "h200", "b200", "h100_mig", "l4", "rtx4090"])
def test_a_gpu_with_fp8_units_trains_a_large_llama_in_fp8_by_default(llama: nn.Module, machine: str) -> None:
    made = plan(llama, machine)
    assert made.precision == "fp8"
    assert len(made.float8_layers) == 14
    assert made.compiled_blocks == ["model.layers.0", "model.layers.1"]
    assert made.accepts("compile loss")
    assert load(machine).primary.name in reason(made, "fp8")
    assert "float8.exclude names it" in reason(made, "lm_head")
    assert reason(made, "precision fp8") == "chosen for this hardware; fp32 master weights, bf16 autocast"


@pytest.mark.parametrize("machine", ["l4", "rtx4090"])
@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_ada_has_no_rowwise_fp8(llama: nn.Module, machine: str, recipe: str) -> None:
    made = plan(llama, machine, float8={"recipe": recipe})
    assert (made.precision, made.float8_layers) == ("bf16-mixed", [])
    assert "it needs Hopper or newer" in reason(made, "fp8")
    with pytest.raises(UnsupportedHardwareError, match=re.escape(load(machine).primary.name)):
        plan(llama, machine, precision="fp8", float8={"recipe": recipe})


@pytest.mark.parametrize("machine", ["h100", "h200", "b200"])
@pytest.mark.parametrize(("recipe", "layers"), [("rowwise", 4), ("rowwise_with_gw_hp", 14)])
def test_hopper_and_blackwell_take_the_rowwise_recipes(
    llama: nn.Module, machine: str, recipe: str, layers: int
) -> None:
    made = plan(llama, machine, float8={"recipe": recipe})
    assert (made.precision, len(made.float8_layers)) == ("fp8", layers)


@pytest.mark.parametrize(
    ("machine", "precision"),
    [("a100", "bf16-mixed"), ("a10", "bf16-mixed"), ("v100", "32"), ("t4", "32"), ("cpu_only", "32"),
     ("cpu_amx", "bf16-mixed"), ("mixed_a100_h100", "bf16-mixed")],
)  # fmt: skip
def test_without_fp8_units_auto_falls_back_and_says_why_and_an_explicit_wish_raises(
    llama: nn.Module, machine: str, precision: str
) -> None:
    made = plan(llama, machine)
    name = load(machine).primary.name
    assert (made.precision, made.float8_layers) == (precision, [])
    assert not made.accepts("fp8")
    assert name in reason(made, "fp8")
    assert name in reason(made, "bf16-mixed")
    assert made.accepts("bf16-mixed") == (precision == "bf16-mixed")
    assert not any(made.layers)
    assert reason(made, "model.layers.0.mlp.up_proj") == "2048 -> 8192: FP8 is not used"
    for attempt in (lambda: plan(llama, machine, precision="fp8"), lambda: check(machine, precision="fp8")):
        with pytest.raises(UnsupportedHardwareError, match=re.escape(name)) as caught:
            attempt()
        assert "precision='auto'" in str(caught.value)
    check(machine, precision="fp8", float8={"emulate": True})


def check(machine: str, **settings: Any) -> None:
    check_explicit(KptConfig.build(settings), load(machine))


def test_of_unlike_gpus_the_weakest_decides_and_is_named(llama: nn.Module) -> None:
    assert "the weakest of 2 unlike devices decides" in reason(plan(llama, "mixed_a100_h100"), "fp8")


@pytest.mark.parametrize("machine", ["h100", "b200", "l4", "a100", "cpu_only"])
def test_the_conservative_level_never_runs_fp8(llama: nn.Module, machine: str) -> None:
    made = plan(llama, machine, level="conservative")
    assert made.precision != "fp8"
    assert reason(made, "fp8") == "level 'conservative' keeps the numbers"


def test_the_aggressive_level_runs_the_head_in_fp8_unless_it_is_tied_or_excluded_by_the_user(llama: nn.Module) -> None:
    assert "lm_head" in plan(llama, "h100", level="aggressive").float8_layers
    excluded = plan(llama, "h100", level="aggressive", float8={"exclude": ["lm_head"]})
    assert "lm_head" not in excluded.float8_layers
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1, "num_attention_heads": 16}
    with torch.device("meta"):
        tied = transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **sizes))
        tied.tie_weights()
    made = plan(tied, "h100", level="aggressive")
    assert "lm_head" not in made.float8_layers
    assert "tied to 'model.embed_tokens'" in reason(made, "lm_head")


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "32"])
@pytest.mark.parametrize("machine", ["h100", "v100", "cpu_only"])
def test_what_is_asked_for_wins_over_what_the_hardware_suggests(llama: nn.Module, machine: str, precision: str) -> None:
    made = plan(llama, machine, precision=precision)
    assert made.precision == precision
    assert reason(made, f"precision {precision}").startswith("asked for")
    assert made.float8_layers == []


def test_the_trainers_own_precision_stays(llama: nn.Module) -> None:
    made = make_plan(llama, KptConfig(), load("h100"), parallel=None, given_precision="16-mixed")
    assert (made.precision, made.parallel, made.layers) == ("16-mixed", "the trainer's strategy", [])
    assert reason(made, "precision 16-mixed") == "the trainer's own setting"


@pytest.mark.parametrize("missing", ["triton", "cc"])
def test_without_a_compiler_auto_rejects_fp8_and_an_explicit_wish_is_met(llama: nn.Module, missing: str) -> None:
    machine = without("h100", missing)
    auto = plan(llama, machine)
    assert (auto.precision, auto.compiled_blocks) == ("bf16-mixed", [])
    assert "without compiled blocks" in reason(auto, "fp8")
    assert reason(auto, "model.layers.0") == "LlamaDecoderLayer: blocks are not compiled"
    explicit = plan(llama, machine, precision="fp8")
    assert (explicit.precision, len(explicit.float8_layers)) == ("fp8", 14)
    with pytest.raises(UnsupportedHardwareError, match=r"compile\.blocks=True was asked for"):
        plan(llama, machine, compile={"blocks": True})


def test_blocks_switched_off_turn_fp8_off_too(llama: nn.Module) -> None:
    made = plan(llama, "h100", compile={"blocks": False, "loss": False})
    assert (made.precision, made.compiled_blocks, made.accepts("compile loss")) == ("bf16-mixed", [], False)
    assert reason(made, "compile blocks") == "switched off"


def test_on_a_cpu_nothing_is_compiled_unless_asked_for(llama: nn.Module) -> None:
    assert plan(llama, "cpu_only").compiled_blocks == []
    assert "compile.blocks=True" in reason(plan(llama, "cpu_only"), "compile blocks")
    assert len(plan(llama, "cpu_amx", compile={"blocks": True}).compiled_blocks) == 2


def test_a_model_whose_layers_are_all_small_stays_in_bf16_and_an_explicit_wish_raises_with_the_reason() -> None:
    small = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 50))
    made = plan(small, "h100")
    assert made.precision == "bf16-mixed"
    assert reason(made, "fp8") == "none of 2 linear layers gains from it"
    with pytest.raises(UnsupportedHardwareError, match="a side of 64 is too small") as caught:
        plan(small, "h100", precision="fp8")
    assert "sizes must be multiples of 16" in str(caught.value)
    assert "float8.only_where_it_pays=False" in str(caught.value)
    with pytest.raises(UnsupportedHardwareError, match="the model has no linear layer"):
        plan(nn.Sequential(nn.Conv2d(3, 4, 3)), "h100", precision="fp8")


def test_gpt2_is_refused_with_the_reason_that_its_layers_are_conv1d() -> None:
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1))
    with pytest.raises(UnsupportedHardwareError, match="Conv1D of transformers"):
        plan(model, "h100", precision="fp8")


def test_planning_changes_nothing(llama: nn.Module) -> None:
    before = [(type(module), set(vars(module))) for module in llama.modules()]
    plan(llama, "h100")
    assert [(type(module), set(vars(module))) for module in llama.modules()] == before


def test_a_run_on_the_cpu_of_a_gpu_machine_is_planned_for_the_cpu(llama: nn.Module) -> None:
    made = plan(llama, on_device(load("h100"), "cpu"))
    assert (made.device, made.precision) == ("Intel(R) Xeon(R) Platinum 8480+", "bf16-mixed")
    assert plan(llama, on_device(load("h100"), "cuda")).precision == "fp8"


def test_the_plan_says_who_chose_the_layout(llama: nn.Module) -> None:
    assert reason(plan(llama, "h100"), "parallel single") == "by device count"
    alone = make_plan(llama, KptConfig(), load("h100"), parallel=None)
    assert alone.parallel == "the trainer's strategy"
    assert not any(choice.subject.startswith("parallel") for choice in alone.choices)
